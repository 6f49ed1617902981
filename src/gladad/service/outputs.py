"""Where decisions go besides the record: to URLs, brokers and PLCs, each decision to each output at least once.

What is to be delivered is kept in the transaction of the decision, and deleted once the other side has taken it. Of several processes with
the same station one delivers for an output at a time, in the order of the decisions' IDs, which is that of their time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from gladad.core.errors import ConfigError, GladError, MissingExtraError
from gladad.service.decisions import Row
from gladad.service.schemas import shown
from gladad.service.settings import SECRETS, ModbusSettings, MqttSettings, Output, OutputSettings, SecretSource
from gladad.service.station import Station
from gladad.service.tables import outbox

log = logging.getLogger("gladad.service")
WAITS = (1.0, 600.0)  # seconds after the first failure and at most
BATCH = 64  # deliveries that are kept as done in one transaction,
BATCH_SECONDS = 2.0  # if they take no longer than this
LEASE_SECONDS = 10.0  # beyond what a batch may take: then the process that began it is dead
IDLE_SECONDS = 0.5  # to the next look for what other processes have decided
CLOSE_SECONDS = 10.0  # in which what is due is still delivered at the end
LONGEST_SECONDS = 1200.0  # longer than any wait or lease: what seems to be due later is so by a clock that was put back


class DeliveryError(GladError):
    """The other side has not taken a decision."""


class Transport(Protocol):
    """A way to deliver. Any error of `send` means that it shall be tried again, a `CancelledError` that it took too long."""

    async def send(self, key: str, body: str) -> None:
        """Deliver a decision, and return when the other side has taken it."""

    async def close(self) -> None:
        """Give the connection back."""


def revealed(settings: Output, folder: Path) -> Output:
    """An output's settings with its secrets in place of where they are.

    Raises:
        ConfigError: One is not there.
    """
    found: dict[str, Any] = {}
    for name in SECRETS:
        source = getattr(settings, name, "")
        if isinstance(source, SecretSource):
            try:
                found[name] = source.read(folder)
            except ConfigError as error:
                raise ConfigError(f"output {settings.name!r}: {name}: {error}") from error
    return replace(settings, **found) if found else settings


def transport(settings: Output) -> Transport:
    """What delivers to an output, whose secrets are `revealed`.

    Raises:
        MissingExtraError: Its package is not installed.
    """
    try:
        if isinstance(settings, MqttSettings):
            from gladad.service.mqtt import Mqtt

            return Mqtt(settings)
        if isinstance(settings, ModbusSettings):
            from gladad.service.modbus import Modbus

            return Modbus(settings)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"output {settings.name!r} ({error.name})", f"'gladad[{settings.method}]'") from error
    from gladad.service.webhook import Webhook

    return Webhook(settings)


class Outbox:
    """The deliveries of a station, on one thread of their own.

    Args:
        station: Whose outputs are delivered to; without any there is no thread.
        waits: Seconds after the first failure, and at most.

    Raises:
        ConfigError: A secret of an output is not where it should be.
        MissingExtraError: An output needs a package that is not installed.
    """

    def __init__(self, station: Station, waits: tuple[float, float] = WAITS):
        self._record, self._outputs, self._waits = station.record, station.settings.outputs, waits
        self._transports = {output.name: transport(revealed(output, station.folder)) for output in self._outputs}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: dict[str, asyncio.Event] = {}
        self._timeouts: set[asyncio.Timeout] = set()
        self._end: float | None = None  # by the loop's time: when to stop at the latest
        self._failing: dict[str, str] = {}
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox")
        if self._outputs:
            self._thread.start()
            self._began.wait()

    def add(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Have decisions delivered, within the transaction that keeps them."""
        made = [
            {"key": f"{output.name}:{row['id']}", "output": output.name, "body": body, "due": 0.0, "attempts": 0}
            for row, body in ((row, shown(row).model_dump_json()) for row in (rows if self._outputs else ()))
            for output in self._outputs
            if row["decision"] in output.decisions and (not output.products or row["product"] in output.products)
        ]
        if made:
            connection.execute(insert(outbox), made)

    def wake(self) -> None:
        """There is something to deliver."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._wake)

    def waiting(self) -> dict[str, int]:
        """How many decisions each output has not taken yet."""
        with self._record.read() as connection:
            found = {name: count for name, count in connection.execute(select(outbox.c.output, func.count()).group_by(outbox.c.output))}
        return {output.name: found.get(output.name, 0) for output in self._outputs}

    def close(self) -> None:
        """Deliver what is due, for some seconds at most, then stop; the rest is delivered after the next start."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._finish)
            self._thread.join()

    # -- on the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # aiomqtt needs this kind of loop
                runner.run(self._main())
        finally:
            self._began.set()

    async def _main(self) -> None:
        self._events = {output.name: asyncio.Event() for output in self._outputs}
        self._loop = asyncio.get_running_loop()
        self._began.set()
        await asyncio.gather(*(self._serve(output) for output in self._outputs))

    def _wake(self) -> None:
        for event in self._events.values():
            event.set()

    def _finish(self) -> None:
        assert self._loop is not None
        end = self._end = self._loop.time() + CLOSE_SECONDS
        for timeout in self._timeouts:
            timeout.reschedule(min(end, timeout.when() or end))
        self._wake()

    async def _serve(self, output: Output) -> None:
        """Deliver to one output until the end."""
        event = self._events[output.name]
        while True:
            event.clear()
            closing = self._end is not None
            try:
                if await self._deliver(output) and not self._late():
                    continue
            except Exception as error:  # the record is away: try again
                self._tell(output, f"{type(error).__name__}: {error}")
            if closing:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), IDLE_SECONDS)
        with suppress(Exception):
            async with asyncio.timeout(output.timeout):
                await self._transports[output.name].close()

    def _late(self) -> bool:
        assert self._loop is not None
        return self._end is not None and self._loop.time() >= self._end

    async def _deliver(self, output: Output) -> bool:
        """Deliver what is due, some decisions at most. Returns whether there may be more."""
        assert self._loop is not None
        claimed = await asyncio.to_thread(self._claim, output)
        done, problem, began = list[str](), None, self._loop.time()
        for key, body in claimed:
            if self._late() or self._loop.time() - began > BATCH_SECONDS:
                break
            try:
                await self._send(output, key, body)
            except Exception as error:  # whatever the other side does, it must not end the deliveries
                problem = None if self._late() else str(error) or type(error).__name__
                break
            done.append(key)
        if claimed:
            await self._settle(output, [key for key, _ in claimed], done, problem)
        if problem is not None:
            self._tell(output, problem)
        elif done and self._failing.pop(output.name, None) is not None:
            log.info("output %s: delivers again", output.name)
        return bool(done) and problem is None

    async def _send(self, output: Output, key: str, body: str) -> None:
        assert self._loop is not None
        end = self._loop.time() + output.timeout
        try:
            async with asyncio.timeout_at(end if self._end is None else min(end, self._end)) as timeout:
                self._timeouts.add(timeout)
                try:
                    await self._transports[output.name].send(key, body)
                finally:
                    self._timeouts.discard(timeout)
        except TimeoutError as error:
            raise DeliveryError(str(error) or f"no answer within {output.timeout:g} s") from error

    def _tell(self, output: OutputSettings, problem: str) -> None:
        """Log why an output takes nothing, once for every reason."""
        if self._failing.get(output.name) != problem:
            self._failing[output.name] = problem
            log.warning("output %s: nothing is delivered (%s); it is tried again", output.name, problem)

    # -- in the record ------------------------------------------------------------------------------------------

    def _claim(self, output: OutputSettings) -> list[tuple[str, str]]:
        """Keys and bodies of what is to be delivered next; the first is leased, so that no other process delivers for this output."""
        with self._record.read() as connection:
            if not self._due(connection, output, 1):
                return []
        with self._record.write() as connection:
            rows = self._due(connection, output, BATCH)
            if rows:
                lease = time.time() + output.timeout + BATCH_SECONDS + LEASE_SECONDS
                connection.execute(update(outbox).where(outbox.c.key == rows[0].key).values(due=lease))
        return [(row.key, row.body) for row in rows]

    def _due(self, connection: Connection, output: OutputSettings, limit: int) -> Sequence[Any]:
        """The next rows of an output; none while one of them is leased or waits after a failure, so that the order is kept."""
        present = time.time()
        other = outbox.alias()
        held = exists().where(other.c.output == output.name, other.c.due.between(present, present + LONGEST_SECONDS))
        own = outbox.c.key.between(f"{output.name}:0", f"{output.name}:g")  # of the index; hexadecimal digits lie between
        query = select(outbox.c.key, outbox.c.body).where(own, outbox.c.output == output.name, ~held).order_by(outbox.c.key)
        return connection.execute(query.limit(limit)).all()

    async def _settle(self, output: OutputSettings, claimed: Sequence[str], done: Sequence[str], problem: str | None) -> None:
        """Keep what became of what was claimed; where the record is away this is tried again, so that nothing is delivered twice."""
        while True:
            try:
                return await asyncio.to_thread(self._settled, claimed, done, problem)
            except GladError as error:
                self._tell(output, str(error))
                if self._late():
                    return None
                await asyncio.sleep(IDLE_SECONDS)

    def _settled(self, claimed: Sequence[str], done: Sequence[str], problem: str | None) -> None:
        first, last = self._waits
        with self._record.write() as connection:
            if done:
                connection.execute(delete(outbox).where(outbox.c.key.in_(done)))
            if len(done) == len(claimed):
                return
            present, values = time.time(), dict[str, Any](due=0.0)
            key = claimed[len(done)]
            if problem is not None:
                attempts = connection.execute(select(outbox.c.attempts).where(outbox.c.key == key)).scalar() or 0
                wait = min(last, first * 2.0 ** min(attempts, 64)) * random.uniform(0.75, 1.25)
                values = {"due": present + wait, "attempts": attempts + 1, "problem": problem}
            connection.execute(update(outbox).where(outbox.c.key == key).values(**values))
