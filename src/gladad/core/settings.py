"""Settings as frozen dataclasses that pydantic validates where they are defined: the constructor's signature is the schema.

What is wrong with a value is one `ConfigError` of one line that names the key, whether it came from Python, JSON, TOML or the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gladad.core.errors import ConfigError

Settings = TypeVar("Settings")
METHOD = "method"
"""The field that tells which of several settings classes a table of settings is of."""
_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def validated(cls: type[Settings]) -> type[Settings]:
    """Class decorator: a frozen, keyword-only dataclass whose values are checked against their types and limits.

    Limits are written as ``Annotated[int, Field(ge=1)]``; what involves several fields is checked in ``__post_init__``, which raises
    `ConfigError`.
    """
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)
    build = made.__init__

    @functools.wraps(build)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            build(self, *args, **values)
        except ValidationError as error:
            raise ConfigError(_sentence(error, made)) from None

    made.__init__ = init
    result: type[Settings] = made
    return result


def to_json(settings: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as a JSON-ready dict (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    result: dict[str, Any] = plain(settings)
    return result


def from_json(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build settings from what `to_json` gave; missing keys keep their defaults.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or out of range.
    """
    try:
        made: Settings = _adapter(typing.cast(Any, kind)).validate_json(json.dumps(values))
        return made
    except ValidationError as error:
        raise ConfigError(_sentence(error, kind)) from None


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """A copy with some values changed, by their names: dotted, or nested as in `to_json`.

    Args:
        settings: Where to start from.
        values: Such as ``{"training.steps": 900}`` or ``{"training": {"steps": 900}}``.

    Raises:
        ConfigError: A name is unknown, or a value is of the wrong type or out of range.
    """
    tree = to_json(settings)
    for name, value in _flat(values):
        *path, last = name.split(".")
        node = tree
        for depth, part in enumerate(path):
            inner = node.get(part)
            if not isinstance(inner, dict):  # unset so far, or unknown
                if part not in _known(type(settings), path[:depth]):
                    raise ConfigError(_unknown(type(settings), path[: depth + 1]))
                inner = node[part] = {}
            node = inner
        if last == METHOD and node.get(METHOD) != value:
            node.clear()  # settings of another method: nothing of the present one's fits it
        node[last] = value
    return from_json(type(settings), tree)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, with the choice of a method before that method's settings."""
    for key, value in sorted(values.items(), key=lambda item: item[0].rsplit(".", 1)[-1] != METHOD):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts of the command line; a value is JSON where it can be read as such, and text elsewhere.

    Raises:
        ConfigError: One has no ``=``.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r}: write a setting as NAME=VALUE, such as training.steps=900")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


@functools.lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _unknown(kind: Any, path: Sequence[str]) -> str:
    known = sorted(_known(kind, path[:-1]))
    near = difflib.get_close_matches(path[-1], known, 3) or known
    return f"{'.'.join(path)}: unknown setting; {'near are' if len(near) < len(known) else 'known are'} {', '.join(near)}"


def _known(kind: Any, path: Sequence[str]) -> set[str]:
    """Names of the settings below a path of names."""
    kinds = [kind]
    for name in path:
        if not name.isdigit():  # the place in a tuple
            kinds = [option for one in kinds for option in _nested(typing.get_type_hints(one, include_extras=False).get(name))]
    return {field.name for one in kinds for field in dataclasses.fields(one)}


def _nested(hint: Any) -> list[Any]:
    """The settings classes that a type names."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) in {typing.Union, types.UnionType, typing.Annotated, tuple}:
        return [kind for option in typing.get_args(hint) for kind in _nested(option)]
    return []


def _sentence(error: ValidationError, kind: Any) -> str:
    """The first mistake, in one line that names the key."""
    first = error.errors(include_url=False)[0]
    path: list[str] = []
    kinds = [kind]
    for part in map(str, first["loc"]):
        if kinds and part not in {field.name for one in kinds for field in dataclasses.fields(one)} and path:
            if (first["type"] == "unexpected_keyword_argument" and part == str(first["loc"][-1])) or part.isdigit():
                path.append(part)
            continue  # the name of one of several kinds of settings
        path.append(part)
        kinds = [option for one in kinds for option in _nested(typing.get_type_hints(one).get(part))]
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(kind, path)
    name = ".".join(path) or getattr(kind, "__name__", "settings")
    if first["type"] == "missing":
        return f"{name}: is missing"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{name}: {message}, not {first['input']!r}"
