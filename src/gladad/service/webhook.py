"""Decisions to a URL, by POST."""

from __future__ import annotations

import hashlib
import hmac

import httpx

from gladad import __version__
from gladad.service.outputs import DeliveryError
from gladad.service.settings import WebhookSettings, text_of

SIGNATURE = "X-Gladad-Signature"
KEY = "Idempotency-Key"
MOST_BYTES = 2**16  # of an answer that are read, so that the connection can be used again


class Webhook:
    """A URL that takes a decision by answering 2xx."""

    def __init__(self, settings: WebhookSettings):
        self._settings = settings
        self._client = httpx.AsyncClient(timeout=settings.timeout, headers={"user-agent": f"gladad/{__version__}"})

    async def send(self, key: str, body: str) -> None:
        """Post a decision.

        Raises:
            DeliveryError: It was answered otherwise.
            httpx.HTTPError: It was not answered.
        """
        content, headers = body.encode(), {"content-type": "application/json", KEY: key}
        if secret := text_of(self._settings.secret):
            headers[SIGNATURE] = f"sha256={signature(secret, content)}"
        async with self._client.stream("POST", self._settings.url, content=content, headers=headers) as answer:
            read = 0
            async for chunk in answer.aiter_raw():
                read += len(chunk)
                if read > MOST_BYTES:
                    break
        if not answer.is_success:
            raise DeliveryError(f"answered {answer.status_code} {answer.reason_phrase}")

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


def signature(secret: str, content: bytes) -> str:
    """HMAC-SHA256 of a body, hexadecimal."""
    return hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()
