"""Outputs: every decision reaches each of them at least once and in order, whatever fails in between."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import json
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from conftest import draw_part
from pymodbus.client import ModbusTcpClient
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice
from service_base import PRODUCT, a_row, free_port, make_station
from sqlalchemy import func, insert, select, update

from gladad.cli.main import main
from gladad.core.errors import ConfigError, MissingExtraError
from gladad.core.settings import from_json
from gladad.service.decisions import Row
from gladad.service.line import Line, Origin
from gladad.service.modbus import scaled
from gladad.service.mqtt import Mqtt
from gladad.service.outputs import Outbox, revealed
from gladad.service.schemas import shown
from gladad.service.settings import ModbusSettings, MqttSettings, Output, SecretSource, StationSettings, WebhookSettings
from gladad.service.station import FILE, KEYS_FILE, Station
from gladad.service.tables import decisions, outbox
from gladad.service.watch import Watch
from gladad.service.webhook import Webhook

SECRET = "between us"


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def station_with(folder: Path, *outputs: Output, model: Path | None = None) -> Station:
    return make_station(folder, model, outputs=outputs)


@contextmanager
def delivering(station: Station) -> Iterator[Outbox]:
    made = Outbox(station, (0.05, 0.4))
    try:
        yield made
    finally:
        made.close()


def add(station: Station, out: Outbox, *rows: Row) -> list[str]:
    """Keep decisions as the line does, but for the decisions themselves; gives their IDs in order."""
    with station.record.write() as connection:
        out.add(connection, rows)
    out.wake()
    return sorted(row["id"] for row in rows)


def numbered(count: int, **values) -> list[Row]:
    return [a_row(id=f"{number:032x}", **values) for number in range(count)]


# -- webhooks ---------------------------------------------------------------------------------------------------


@dataclass
class Receiver:
    """A web server that answers what it is told to."""

    url: str = ""
    failures: int = 0
    delay: float = 0.0
    received: list[tuple[dict[str, str], bytes, int]] = field(default_factory=list)

    def keys(self) -> list[str]:
        """Of what it took."""
        return [headers["idempotency-key"] for headers, _, status in self.received if status == 200]


@contextmanager
def receiving(port: int = 0, **values) -> Iterator[Receiver]:
    made = Receiver(**values)

    class Handler(BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", -1  # an answer is one packet: a second one would wait for an acknowledgement

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            time.sleep(made.delay)
            status = 500 if made.failures > 0 else 200
            made.failures -= 1
            made.received.append(({name.lower(): value for name, value in self.headers.items()}, body, status))
            try:
                self.send_response(status)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"ok")
            except OSError:  # nobody waits any more
                self.close_connection = True

        def log_message(self, *_) -> None:
            pass

    class Server(ThreadingHTTPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", port), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}/decisions"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def test_a_decision_is_delivered_with_its_image(model, tmp_path):
    buffer = io.BytesIO()
    draw_part(2001, defective=True)[0].save(buffer, "PNG")
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox/part.png").write_bytes(buffer.getvalue())
    with receiving(failures=2) as receiver:
        station = station_with(tmp_path / "line", WebhookSettings(url=receiver.url, secret=SECRET), model=model)
        line = Line(station, 1)
        try:
            until(lambda: line.ready)
            row = line.inspect(PRODUCT, buffer.getvalue(), Origin("tester", "rest", "part.png")).result()
            until(lambda: len(receiver.received) == 3)
            Watch(line, PRODUCT, tmp_path / "inbox", "tester", settle=0.1).run(once=True)
        finally:
            line.close()  # delivers what is due
        assert [status for _, _, status in receiver.received] == [500, 500, 200, 200]
        for headers, body, _ in receiver.received[:3]:
            assert headers["idempotency-key"] == f"webhook:{row['id']}" and headers["content-type"] == "application/json"
            assert headers["x-gladad-signature"] == "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
            assert json.loads(body) == shown(row).model_dump(mode="json")
        assert json.loads(receiver.received[3][1])["source"] == "watch"
        station.close()


def test_what_is_not_kept_is_not_delivered(model, tmp_path):
    buffer = io.BytesIO()
    draw_part(5)[0].save(buffer, "PNG")
    with receiving() as receiver:
        station = station_with(tmp_path / "line", WebhookSettings(url=receiver.url), model=model)
        line = Line(station, 1)

        def refuse(connection, row) -> None:
            assert connection.execute(select(func.count()).select_from(outbox)).scalar_one() == 1
            raise OSError("the disk")

        try:
            until(lambda: line.ready)
            with pytest.raises(OSError, match="the disk"):
                line.inspect(PRODUCT, buffer.getvalue(), Origin("tester", "rest"), also=refuse).result()
        finally:
            line.close()
        with station.record.read() as connection:
            assert connection.execute(select(func.count()).select_from(decisions)).scalar_one() == 0
            assert connection.execute(select(func.count()).select_from(outbox)).scalar_one() == 0
        assert receiver.received == []
        station.close()


def test_what_was_not_taken_is_delivered_after_a_restart(tmp_path):
    port = free_port()
    station = station_with(tmp_path / "line", WebhookSettings(url=f"http://127.0.0.1:{port}/"))
    with delivering(station) as out:  # nobody listens
        keys = [f"webhook:{identity}" for identity in add(station, out, *numbered(5))]
        until(lambda: _row(station, keys[0])["attempts"] >= 2)
        assert "ConnectError" in (problem := _row(station, keys[0])["problem"]) or "connect" in problem.lower()
    assert _row(station, keys[0])["due"] > time.time() - 1 and _row(station, keys[1])["attempts"] == 0
    with receiving(port) as receiver:
        with delivering(station) as out:
            until(lambda: out.waiting() == {"webhook": 0})
        assert receiver.keys() == keys
    station.close()


def _row(station: Station, key: str) -> Row:
    with station.record.read() as connection:
        return dict(connection.execute(select(outbox).where(outbox.c.key == key)).one()._mapping)


def test_outputs_get_what_they_want_in_order(tmp_path):
    with receiving(failures=3) as every, receiving() as rejects, receiving() as gears:
        station = station_with(
            tmp_path / "line",
            WebhookSettings(name="every", url=every.url),
            WebhookSettings(name="rejects", url=rejects.url, decisions=("warn", "reject")),
            WebhookSettings(name="gears", url=gears.url, products=("gear",)),
        )
        rows = [a_row(id=f"{number:032x}", decision=("accept", "warn", "reject")[number % 3]) for number in range(150)]
        rows[7]["product"] = "gear"
        with delivering(station) as out:
            for start in range(0, 150, 10):
                add(station, out, *rows[start : start + 10])
            until(lambda: set(out.waiting().values()) == {0})
        assert every.keys() == [f"every:{row['id']}" for row in rows]
        assert rejects.keys() == [f"rejects:{row['id']}" for row in rows if row["decision"] != "accept"]
        assert gears.keys() == [f"gears:{rows[7]['id']}"]
        assert "x-gladad-signature" not in gears.received[0][0]
        station.close()


def test_an_output_that_hangs_holds_up_no_other(tmp_path):
    with receiving(delay=1.0) as slow, receiving() as quick:
        outputs = WebhookSettings(name="slow", url=slow.url, timeout=0.3), WebhookSettings(name="quick", url=quick.url)
        station = station_with(tmp_path / "line", *outputs)
        with delivering(station) as out:
            add(station, out, *numbered(20))
            until(lambda: out.waiting()["quick"] == 0)
            assert out.waiting()["slow"] == 20
            until(lambda: "no answer within 0.3 s" in (_row(station, f"slow:{0:032x}")["problem"] or ""))
            slow.delay = 0.0
            until(lambda: out.waiting()["slow"] == 0)
        assert list(dict.fromkeys(slow.keys())) == [f"slow:{number:032x}" for number in range(20)]  # some were taken too late
        station.close()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_processes_deliver_once_and_in_order(tmp_path, request, database):
    """Two connections, as a server and a watched folder have."""
    url = request.getfixturevalue("postgresql").format("postgres") if database == "postgresql" else ""
    with receiving() as receiver:
        first = make_station(tmp_path / "line", outputs=(WebhookSettings(url=receiver.url),), database=url)
        second = Station(tmp_path / "line")
        with delivering(first) as one, delivering(second) as other:
            rows = numbered(200)
            for number, row in enumerate(rows):
                add(*((first, one) if number % 2 else (second, other)), row)
            until(lambda: one.waiting() == {"webhook": 0})
        assert receiver.keys() == [f"webhook:{row['id']}" for row in rows]
        first.close()
        second.close()


def test_what_a_dead_process_had_claimed_is_delivered_after_its_lease(tmp_path):
    with receiving() as receiver:
        station = station_with(tmp_path / "line", WebhookSettings(url=receiver.url))
        with station.record.write() as connection:
            values = {"output": "webhook", "body": "{}", "attempts": 0}
            lease = time.time() + 1.5
            connection.execute(insert(outbox), [values | {"key": f"webhook:{number}", "due": lease * (number == 0)} for number in range(3)])
        with delivering(station) as out:
            until(lambda: out.waiting() == {"webhook": 0})
            assert time.time() > lease
        assert receiver.keys() == ["webhook:0", "webhook:1", "webhook:2"]
        with station.record.write() as connection:  # by a clock that was wrong
            connection.execute(insert(outbox), [values | {"key": "webhook:3", "due": time.time() + 1e6}])
        with delivering(station) as out:
            until(lambda: out.waiting() == {"webhook": 0})
        station.close()


def test_what_waits_for_an_output_that_was_removed_is_kept(tmp_path):
    station = station_with(tmp_path / "line")
    with station.record.write() as connection:
        connection.execute(insert(outbox), [{"key": "old:0", "output": "old", "body": "{}", "due": 0.0, "attempts": 3}])
    with delivering(station) as out:
        add(station, out, *numbered(3))
        assert out.waiting() == {}
    with station.record.read() as connection:
        assert connection.execute(select(outbox.c.key)).scalars().all() == ["old:0"]
    station.close()


# -- MQTT -------------------------------------------------------------------------------------------------------


@contextmanager
def broker(folder: Path, port: int) -> Iterator[None]:
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    if not Path(program).is_file() or shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto is not installed (Debian: mosquitto)")
    folder.mkdir(exist_ok=True)
    passwords = folder / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "station", SECRET], check=True, capture_output=True)
    user = "user root\n" if hasattr(socket, "AF_UNIX") and folder.stat().st_uid == 0 else ""  # else it could not read the passwords
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\nlog_dest none\n{user}")
    process = subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _listens(port))
        yield
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def subscribed(port: int, topic: str) -> Iterator[list[paho.MQTTMessage]]:
    messages: list[paho.MQTTMessage] = []
    ready = threading.Event()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.username_pw_set("station", SECRET)
    client.on_message = lambda _, __, message: messages.append(message)
    client.on_subscribe = lambda *_: ready.set()
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        client.subscribe(topic, qos=1)
        assert ready.wait(10)
        yield messages
    finally:
        client.disconnect()
        client.loop_stop()


def test_decisions_are_published(tmp_path):
    port = free_port()
    settings = MqttSettings(host="127.0.0.1", port=port, username="station", password=SECRET, retained=True, timeout=2.0)
    station = station_with(tmp_path / "line", settings)
    rows = numbered(40)
    with delivering(station) as out:
        with broker(tmp_path / "broker", port), subscribed(port, "gladad/+/decision") as messages:
            add(station, out, *rows)
            until(lambda: out.waiting() == {"mqtt": 0} and len(messages) == 40)
            assert [json.loads(message.payload) for message in messages] == [shown(row).model_dump(mode="json") for row in rows]
            assert {(message.topic, message.qos) for message in messages} == {(f"gladad/{PRODUCT}/decision", 1)}
        add(station, out, *(last := [a_row(id="f" * 32), a_row(id="e" * 32)]))  # the broker is away
        until(lambda: _row(station, f"mqtt:{'e' * 32}")["attempts"] >= 1)
        with broker(tmp_path / "broker", port):
            until(lambda: out.waiting() == {"mqtt": 0})
            with subscribed(port, f"gladad/{PRODUCT}/decision") as messages:
                until(lambda: messages)
                assert messages[0].retain and json.loads(messages[0].payload)["id"] == last[0]["id"]
    station.close()


def test_a_broker_that_refuses_is_tried_again(tmp_path):
    port = free_port()
    station = station_with(tmp_path / "line", MqttSettings(host="127.0.0.1", port=port, username="station", password="wrong", timeout=2.0))
    with broker(tmp_path / "broker", port), delivering(station) as out:
        add(station, out, *numbered(1))
        until(lambda: _row(station, f"mqtt:{0:032x}")["attempts"] >= 2)
        assert "uthor" in _row(station, f"mqtt:{0:032x}")["problem"]
        assert out.waiting() == {"mqtt": 1}
    station.close()


# -- Modbus -----------------------------------------------------------------------------------------------------


@contextmanager
def device(port: int) -> Iterator[list[list[int]]]:
    """A PLC with 20 holding registers; gives what is written to them."""
    written: list[list[int]] = []
    started = threading.Event()
    ended: list[asyncio.Event] = []

    def trace(sending: bool, pdu):
        if not sending and pdu.function_code == 16:
            written.append(list(pdu.registers))
        return pdu

    async def serve() -> None:
        ended.append(asyncio.Event())
        registers = SimDevice(id=1, simdata=[SimData(0, count=20, values=0, datatype=DataType.REGISTERS)])
        server = ModbusTcpServer(registers, address=("127.0.0.1", port), trace_pdu=trace)
        await server.serve_forever(background=True)
        loops.append(asyncio.get_running_loop())
        started.set()
        await ended[0].wait()
        await server.shutdown()

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(10)
        yield written
    finally:
        loops[0].call_soon_threadsafe(ended[0].set)
        thread.join()


def test_decisions_are_written_to_registers(tmp_path):
    port = free_port()
    station = station_with(tmp_path / "line", ModbusSettings(host="127.0.0.1", port=port, address=7, timeout=2.0))
    rows = [
        a_row(id=f"{number:032x}", score=score, decision=decision)
        for number, (score, decision) in enumerate([(0.3, "accept"), (0.95, "warn"), (70.0, "reject"), (1.0004, "reject")])
    ]
    with delivering(station) as out:
        add(station, out, rows[0])  # nobody listens
        until(lambda: _row(station, f"modbus:{0:032x}")["attempts"] >= 1)
        with device(port) as written:
            add(station, out, *rows[1:])
            until(lambda: out.waiting() == {"modbus": 0})
            assert written == [[1, 1, 300], [2, 2, 950], [3, 3, 65535], [4, 3, 1000]]
            with ModbusTcpClient("127.0.0.1", port=port) as client:
                assert client.read_holding_registers(6, count=5).registers == [0, 4, 3, 1000, 0]
                client.write_registers(7, [65535])
            add(station, out, a_row(id="f" * 32, score=0.0))
            until(lambda: out.waiting() == {"modbus": 0})
            assert written[-1] == [0, 1, 0]
    station.close()


def test_registers_that_a_device_has_not_are_tried_again(tmp_path):
    port = free_port()
    station = station_with(tmp_path / "line", ModbusSettings(host="127.0.0.1", port=port, address=500, timeout=2.0))
    with device(port) as written, delivering(station) as out:
        add(station, out, *numbered(1))
        until(lambda: _row(station, f"modbus:{0:032x}")["attempts"] >= 2)
        assert "the device refuses it" in _row(station, f"modbus:{0:032x}")["problem"] and written == []
    station.close()


@pytest.mark.parametrize(("score", "register"), [(-1.0, 0), (0.0, 0), (0.0004, 0), (0.9996, 1000), (65.535, 65535), (1e300, 65535)])
def test_a_register_holds_a_score(score, register):
    assert scaled(score) == register


# -- settings ---------------------------------------------------------------------------------------------------

WRONG = {
    "method": ([{"method": "fax", "number": "1"}], "outputs.0.method: must be one of 'webhook', 'mqtt', 'modbus'"),
    "key": ([{"method": "mqtt", "hots": "x", "host": "x"}], "outputs.0.hots: unknown setting"),
    "url": ([{"method": "webhook", "url": "ftp://x"}], "outputs.0.url"),
    "topic": ([{"method": "mqtt", "host": "x", "topic": "all/#"}], "outputs.0.topic"),
    "twice": ([{"method": "mqtt", "host": "x"}, {"method": "mqtt", "host": "y"}], "two are called 'mqtt'"),
    "name": ([{"method": "webhook", "url": "http://x", "name": "a:b"}], "outputs.0.name"),
    "address": ([{"method": "modbus", "host": "x", "address": 65534}], "outputs.0.address"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_named(case):
    outputs, words = WRONG[case]
    with pytest.raises(ConfigError) as error:
        from_json(StationSettings, {"outputs": outputs})
    assert words in str(error.value)


def test_secrets_come_from_where_the_settings_say(tmp_path, monkeypatch):
    monkeypatch.setenv("GLADAD_TEST_SECRET", SECRET)
    station = station_with(tmp_path / "line", WebhookSettings(url="http://x", secret=SecretSource(env="GLADAD_TEST_SECRET")))
    station.close()
    text = (tmp_path / "line" / FILE).read_text()
    assert SECRET not in text and "GLADAD_TEST_SECRET" in text
    (tmp_path / "line/password").write_text(SECRET + "\n")
    with receiving() as receiver:
        webhook = {"method": "webhook", "url": receiver.url, "secret": {"env": "GLADAD_TEST_SECRET"}}
        mqtt = {"method": "mqtt", "host": "127.0.0.1", "password": {"file": "password"}}
        (tmp_path / "line" / FILE).write_text(json.dumps({"outputs": [webhook, mqtt]}))
        station = Station(tmp_path / "line")
        assert revealed(station.settings.outputs[1], station.folder).password == SECRET
        assert revealed(station.settings.outputs[0], station.folder).secret == SECRET not in repr(station.settings)
        (tmp_path / "line" / FILE).write_text(json.dumps({"outputs": [webhook]}))
        station.close()
        station = Station(tmp_path / "line")
        with delivering(station) as made:
            with station.record.write() as connection:
                made.add(connection, [a_row()])
            made.wake()
            until(lambda: receiver.received)
    headers, body, _ = receiver.received[0]
    assert headers["x-gladad-signature"] == "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    station.close()


@pytest.mark.parametrize(
    ("secret", "told"),
    [
        ({"env": "GLADAD_TEST_MISSING"}, "output 'webhook': secret: the environment variable GLADAD_TEST_MISSING is not set"),
        ({"file": "none"}, "none: cannot be read"),
        ({"file": "empty"}, "empty: is empty"),
        ({"env": "A", "file": "b"}, "a secret is given as text, as env"),
        ({}, "a secret is given as text, as env"),
        ({"enf": "A"}, "enf: unknown setting"),
        (7, "outputs.0.secret"),
    ],
)
def test_a_secret_that_is_not_there_is_told(tmp_path, capsys, secret, told):
    station_with(tmp_path / "line").close()
    (tmp_path / "line/empty").write_text("\n")
    (tmp_path / "line" / FILE).write_text(json.dumps({"outputs": [{"method": "webhook", "url": "http://x", "secret": secret}]}))
    (tmp_path / "inbox").mkdir()
    assert main(["watch", str(tmp_path / "inbox"), "--station", str(tmp_path / "line"), "--product", PRODUCT, "--once"]) == 1
    assert told in capsys.readouterr().err


def test_files_with_secrets_are_for_their_user_only(tmp_path):
    station = Station(tmp_path / "line")
    station.add_key("robot", "tester")
    for name in (FILE, KEYS_FILE):
        assert stat.S_IMODE((tmp_path / "line" / name).stat().st_mode) == 0o600
    station.remove_key("robot", "tester")
    assert stat.S_IMODE((tmp_path / "line" / KEYS_FILE).stat().st_mode) == 0o600
    station.close()


def test_a_secret_is_never_sent_as_where_it_lies():
    webhook = WebhookSettings(url="http://x", secret=SecretSource(env="NAME"))
    with pytest.raises(TypeError, match="before it was read"):
        asyncio.run(Webhook(webhook).send("key", "{}"))
    with pytest.raises(TypeError, match="before it was read"):
        asyncio.run(Mqtt(MqttSettings(host="127.0.0.1", password=SecretSource(file="f"))).send("key", '{"product": "gear"}'))


def test_secrets_are_not_shown():
    assert SECRET not in repr(
        StationSettings(outputs=(WebhookSettings(url="http://x", secret=SECRET), MqttSettings(host="x", password=SECRET)))
    )


@pytest.mark.parametrize(("settings", "package"), [(MqttSettings(host="x"), "aiomqtt"), (ModbusSettings(host="x"), "pymodbus")])
def test_a_missing_package_is_told_at_the_start(tmp_path, monkeypatch, settings, package):
    station = station_with(tmp_path / "line", settings)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.client", None)
    monkeypatch.delitem(sys.modules, f"gladad.service.{settings.method}", raising=False)
    threads = threading.active_count()
    with pytest.raises(MissingExtraError, match=rf"pip install 'gladad\[{settings.method}\]'"):
        Line(station, 1)
    assert threading.active_count() == threads
    station.close()


def test_a_delivery_waits_longer_each_time(tmp_path):
    station = station_with(tmp_path / "line", WebhookSettings(url="http://127.0.0.1:9/"))
    out = Outbox(station)
    key, waits = f"webhook:{0:032x}", []
    try:
        with station.record.write() as connection:
            connection.execute(insert(outbox), [{"key": key, "output": "webhook", "body": "{}", "due": time.time() + 1000, "attempts": 0}])
        for attempts in (0, 1, 5, 9, 40):
            with station.record.write() as connection:
                connection.execute(update(outbox).values(attempts=attempts))
            out._settled([key], [], "refused")
            waits.append(_row(station, key)["due"] - time.time())
            assert _row(station, key)["attempts"] == attempts + 1
    finally:
        out.close()
        station.close()
    for wait, expected in zip(waits, (1, 2, 32, 512, 600), strict=True):
        assert 0.7 * expected < wait < 1.3 * expected
