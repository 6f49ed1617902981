"""What may be chosen about a station: ``station.json`` in its folder."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gladad.core.errors import ConfigError
from gladad.core.settings import METHOD, validated

Keep = Literal["all", "rejected", "none"]
Decided = Literal["accept", "warn", "reject"]
OutputName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=300)]


@validated
class SecretSource:
    """Where a secret is, so that it need not lie in ``station.json``: in one of these."""

    env: str = ""  # name of an environment variable
    file: str = ""  # path of a file, relative to the station's folder, that holds nothing else; a last line end does not count

    def __post_init__(self) -> None:
        if bool(self.env) == bool(self.file):
            raise ConfigError("a secret is given as text, as env, the name of an environment variable, or as file, a path")

    def read(self, folder: Path) -> str:
        """The secret.

        Args:
            folder: Of the station.

        Raises:
            ConfigError: It is not there, or empty.
        """
        try:
            found = os.environ[self.env] if self.env else (folder / self.file).read_text("utf-8").removesuffix("\n").removesuffix("\r")
        except KeyError:
            raise ConfigError(f"the environment variable {self.env} is not set") from None
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{folder / self.file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if not found:
            raise ConfigError(f"{self.env or folder / self.file}: is empty")
        return found


Secret = str | SecretSource


def text_of(secret: Secret) -> str:
    """A secret as text.

    Raises:
        TypeError: It is only known where it lies (`gladad.service.outputs.revealed` reads it).
    """
    if isinstance(secret, SecretSource):
        raise TypeError("a secret was to be used before it was read from where it lies")
    return secret


@validated
class OutputSettings:
    """What all outputs have; each is told every decision that it wants until it has taken it."""

    name: OutputName  # tells it from the others; what waits for an output waits for its name
    decisions: tuple[Decided, ...] = ("accept", "warn", "reject")  # which it wants
    products: tuple[str, ...] = ()  # and of which products; empty: all
    timeout: Seconds = 10.0  # seconds that a delivery may take


@validated
class WebhookSettings(OutputSettings):
    """A URL that the decision is sent to, as JSON."""

    method: Literal["webhook"] = "webhook"
    name: OutputName = "webhook"
    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+\S*$")]
    secret: Secret = field(default="", repr=False)  # key of the HMAC-SHA256 of the body in X-Gladad-Signature; empty: it is not signed


@validated
class MqttSettings(OutputSettings):
    """A broker that the decision is published at, as JSON, at quality of service 1."""

    method: Literal["mqtt"] = "mqtt"
    name: OutputName = "mqtt"
    host: str
    port: Port = 1883  # with TLS mostly 8883
    topic: Annotated[str, Field(pattern=r"^[^+#\x00]+$")] = "gladad/{product}/decision"
    username: str = ""  # empty: without
    password: Secret = field(default="", repr=False)
    tls: bool = False  # the broker's certificate is checked by the authorities of this system
    retained: bool = False  # the broker gives the last decision to whoever subscribes later


@validated
class ModbusSettings(OutputSettings):
    """A Modbus/TCP server, such as a PLC, whose holding registers get a counter, the decision and 1000 times the score."""

    method: Literal["modbus"] = "modbus"
    name: OutputName = "modbus"
    host: str
    port: Port = 502
    device: Annotated[int, Field(ge=0, le=255)] = 1
    address: Annotated[int, Field(ge=0, le=65533)] = 0  # of the first of the three registers, from 0


SECRETS = ("secret", "password")
"""Names of the settings that are secrets."""
Output = Annotated[WebhookSettings | MqttSettings | ModbusSettings, Field(discriminator=METHOD)]


@validated
class StationSettings:
    """Settings of a station; what is missing in the file keeps its default."""

    database: str = ""  # URL of SQLAlchemy, such as postgresql+psycopg://user@host/name; empty: SQLite in the folder
    queue: Annotated[int, Field(ge=1)] = 64  # images that may wait or be under way at a time; one more is refused
    deadline: Annotated[float, Field(gt=0)] = 30.0  # seconds that a request may take
    head_seconds: Annotated[float, Field(gt=0)] = 10.0  # seconds until the headers of a request must be there
    body_seconds: Annotated[float, Field(gt=0)] = 30.0  # seconds that sending a body may take
    max_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20  # of one body
    max_pixels: Annotated[int, Field(ge=64)] = 50_000_000  # of one image
    max_files: Annotated[int, Field(ge=1)] = 32  # images of one body
    loaded: Annotated[int, Field(ge=1)] = 4  # versions that are kept in memory
    keep: Keep = "all"  # pictures of which decisions are kept; "rejected" includes warnings
    keep_days: Annotated[float, Field(gt=0)] = 30.0  # pictures older than this are deleted; decisions never are
    keep_gib: Annotated[float, Field(gt=0)] = 20.0  # and the oldest ones, once they take more space than this
    parts_per_false_alarm: Annotated[int, Field(ge=100)] = 100_000  # of the drift test: good parts between two false alarms, on average
    outputs: tuple[Output, ...] = ()  # where decisions go besides the record

    def __post_init__(self) -> None:
        names = [output.name for output in self.outputs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"outputs: two are called {twice[0]!r}; give each a name of its own")
