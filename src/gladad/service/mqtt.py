"""Decisions to an MQTT broker."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress

import aiomqtt

from gladad.service.settings import MqttSettings, text_of

LEAVE_SECONDS = 1.0
quiet = logging.getLogger("gladad.service.mqtt")  # what goes wrong is an error, which the outputs log
quiet.addHandler(logging.NullHandler())
quiet.propagate = False


class Mqtt:
    """A broker that takes a decision by acknowledging its publication."""

    def __init__(self, settings: MqttSettings):
        self._settings = settings
        self._client: aiomqtt.Client | None = None

    async def send(self, key: str, body: str) -> None:
        """Publish a decision.

        Raises:
            aiomqtt.MqttError: It was not acknowledged.
        """
        topic = self._settings.topic.replace("{product}", json.loads(body)["product"])
        try:
            client = await self._connected()
            await client.publish(topic, body, qos=1, retain=self._settings.retained)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Leave the broker."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await client.__aexit__(None, None, None)

    async def _connected(self) -> aiomqtt.Client:
        if self._client is None:
            settings = self._settings
            self._client = aiomqtt.Client(
                settings.host,
                settings.port,
                username=settings.username or None,
                password=text_of(settings.password) or None,
                logger=quiet,
                timeout=settings.timeout,
                tls_params=aiomqtt.TLSParameters() if settings.tls else None,
            )
            await self._client.__aenter__()
        return self._client
