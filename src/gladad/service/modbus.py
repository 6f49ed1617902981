"""Decisions to a PLC, by Modbus/TCP.

Three holding registers, written at once: a counter that changes with every decision, from 0 again after 65535; the decision, 1 accepted, 2
warned of, 3 rejected; and 1000 times the score, at most 65535. A PLC reads them as a state: it sees only the last decision before it looks.
A decision whose writing was not answered is written again, with the next count.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from pymodbus.client import AsyncModbusTcpClient

from gladad.service.decisions import ACCEPT, REJECT, WARN
from gladad.service.outputs import DeliveryError
from gladad.service.settings import ModbusSettings

CODES = {ACCEPT: 1, WARN: 2, REJECT: 3}
FULL = 65535  # of a register
logging.getLogger("pymodbus").addHandler(logging.NullHandler())  # what goes wrong is an error, which the outputs log


class Registers:
    """The holding registers of a device; all that is known here of pymodbus, whose interface changes."""

    def __init__(self, host: str, port: int, device: int, timeout: float):
        self._address, self._device, self._timeout = (host, port), device, timeout
        self._client: AsyncModbusTcpClient | None = None

    async def read(self, address: int) -> int:
        """A register."""
        client = await self._connected()
        return int(_checked(await client.read_holding_registers(address, count=1, device_id=self._device)).registers[0])

    async def write(self, address: int, values: Sequence[int]) -> None:
        """Several registers from an address on, at once."""
        client = await self._connected()
        _checked(await client.write_registers(address, list(values), device_id=self._device))

    def close(self) -> None:
        """Give the connection back."""
        if self._client is not None:
            self._client.close()
            self._client = None

    async def _connected(self) -> AsyncModbusTcpClient:
        if self._client is None:
            host, port = self._address
            client = AsyncModbusTcpClient(host, port=port, timeout=self._timeout, retries=0, reconnect_delay=0)
            if not await client.connect():
                client.close()
                raise DeliveryError(f"{host}:{port} cannot be reached")
            self._client = client
        return self._client


def _checked(answer: Any) -> Any:
    if answer.isError():
        raise DeliveryError(f"the device refuses it ({answer})")
    return answer


class Modbus:
    """A device that takes a decision by answering that the registers are written."""

    def __init__(self, settings: ModbusSettings):
        self._settings = settings
        self._registers = Registers(settings.host, settings.port, settings.device, settings.timeout)

    async def send(self, key: str, body: str) -> None:
        """Write a decision. The count is read before, since another process may have written the last one.

        Raises:
            DeliveryError: The device cannot be reached or refuses it.
        """
        decision, address = json.loads(body), self._settings.address
        try:
            counter = (await self._registers.read(address) + 1) % (FULL + 1)
            await self._registers.write(address, [counter, CODES[decision["decision"]], scaled(decision["score"])])
        except BaseException:
            self._registers.close()
            raise

    async def close(self) -> None:
        """Give the connection back."""
        self._registers.close()


def scaled(score: float) -> int:
    """1000 times a score, as a register holds it."""
    return round(min(max(1000 * score, 0), FULL))
