"""Settings as frozen dataclasses, to and from JSON: the constructor signature is the schema."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from gladad.errors import ConfigError

Settings = TypeVar("Settings")


def to_json(settings: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as a JSON-ready dict (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    result: dict[str, Any] = plain(settings)
    return result


def from_json(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Build a dataclass from what `to_json` gave; missing keys keep their defaults.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            arguments[name] = from_json(typing.cast(type[Any], hint), value)
            continue
        arguments[name] = _check(f"{kind.__name__}.{name}", hint, tuple(value) if isinstance(value, list) else value)
    return kind(**arguments)


def _check(name: str, hint: Any, value: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        ok = value in options
    elif origin in (tuple, dict):
        ok = isinstance(value, origin)
    elif options:  # a union
        ok = any(_fits(option, value) for option in options)
    else:
        ok = _fits(hint, value)
    if not ok:
        raise ConfigError(f"{name}: {value!r} is not {getattr(hint, '__name__', str(hint))}")
    return value


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)
