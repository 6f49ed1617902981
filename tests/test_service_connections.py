"""Connections of the web server: slow headers, and TLS."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import httpx
import pytest
from service_base import make_station, served
from test_service import free_port, start

from gladad.cli.main import main
from gladad.client import Client, ServiceError
from gladad.core.errors import ConfigError

HEAD = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """Port of a server that waits for headers for 0.4 s."""
    station = make_station(tmp_path_factory.mktemp("hasty") / "line", head_seconds=0.4)
    with served(station) as url:
        yield int(url.rsplit(":", 1)[1])
    station.close()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


def dribble(sent: socket.socket) -> bytes:
    """Send one header line after the other, until the other side ends it; gives what it said."""
    said = b""
    sent.settimeout(0.05)
    for _ in range(400):
        try:
            sent.sendall(b"a: b\r\n")
            more = sent.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return said
        if not more:
            return said
        said += more
    raise AssertionError("it was never cut off")


def test_who_dribbles_headers_is_cut_off(hasty):
    with connected(hasty) as sent:
        sent.sendall(HEAD)
        said = dribble(sent)
    assert said.startswith(b"HTTP/1.1 408 ") and b"headers of the request took too long" in said


def test_so_is_who_does_it_in_a_later_request(hasty):
    with connected(hasty) as sent:
        sent.sendall(HEAD + b"\r\n")
        said = sent.recv(4096)
        assert said.startswith(b"HTTP/1.1 200 ")
        while not said.endswith(b"ok"):
            said += sent.recv(4096)
        sent.sendall(HEAD)
        assert dribble(sent).startswith(b"HTTP/1.1 408 ")


def test_and_who_says_nothing(hasty):
    with connected(hasty) as sent:
        assert sent.recv(4096) == b""


def test_a_slow_body_and_an_idle_connection_have_their_own_limits(hasty):
    with connected(hasty) as sent:
        for _ in range(2):
            sent.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n")
            for letter in b'{"kind": 1} ':
                time.sleep(0.06)
                sent.sendall(bytes([letter]))
            said = sent.recv(4096)
            assert said.startswith(b"HTTP/1.1 422 ")
            while not said.endswith(b"}"):
                said += sent.recv(4096)
            time.sleep(0.6)


# -- TLS --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return made_certificate(tmp_path_factory.mktemp("tls"))


def made_certificate(folder, *options: str):
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *name, *files, *(options or ["-nodes"])]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return folder / "certificate.pem"


def test_tls(certificate, tmp_path):
    make_station(tmp_path / "line").close()
    port = free_port()
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + certificate.with_name("key.pem").read_bytes())
    for options in (
        ["--tls-certificate", str(certificate), "--tls-key", str(certificate.with_name("key.pem"))],
        ["--tls-certificate", str(both)],
    ):
        server = start(tmp_path / "line", port, *options, authority=certificate)
        try:
            with Client(f"https://127.0.0.1:{port}", authority=certificate) as client:
                assert client.audit_head().sequence == 0
            with Client(f"https://127.0.0.1:{port}") as stranger, pytest.raises(ServiceError, match="certificate"):
                stranger.products()
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/livez")
        finally:
            server.terminate()
            server.wait()


@pytest.mark.parametrize("content", [None, "nothing"])
def test_an_authority_that_is_none_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "authority.pem").write_text(content)
    with pytest.raises(ConfigError, match=r"authority\.pem: no certificate as PEM"):
        Client("https://127.0.0.1:1", authority=tmp_path / "authority.pem")


@pytest.mark.parametrize("case", ["key alone", "missing", "no key", "of another", "no certificate", "password"])
def test_certificates_that_cannot_be_served_by_are_refused(certificate, tmp_path, capsys, case):
    make_station(tmp_path / "line").close()
    (tmp_path / "other").mkdir()
    key = certificate.with_name("key.pem")
    other = made_certificate(tmp_path / "other", "-passout", "pass:secret")
    (tmp_path / "text.pem").write_text("nothing")
    given, told = {
        "key alone": ([None, key], "--tls-certificate"),
        "missing": ([tmp_path / "none.pem", key], "none.pem: no such file"),
        "no key": ([certificate, None], "no certificate with its key"),
        "of another": ([other, key], "no certificate with its key"),
        "no certificate": ([tmp_path / "text.pem", key], "text.pem"),
        "password": ([other, other.with_name("key.pem")], "has a password"),
    }[case]
    options = [part for name, path in zip(("--tls-certificate", "--tls-key"), given, strict=True) if path for part in (name, str(path))]
    assert main(["serve", "--station", str(tmp_path / "line"), *options]) == 1
    assert told in capsys.readouterr().err
