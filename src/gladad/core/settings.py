"""Settings as frozen dataclasses, to and from JSON: the constructor signature is the schema."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from gladad.core.errors import ConfigError

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
        nested = next((option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)), None)
        if nested is not None and (nested is hint or value is not None):
            if not isinstance(value, dict):
                raise ConfigError(f"{kind.__name__}.{name}: {value!r} is not a table of settings")
            arguments[name] = from_json(typing.cast(type[Any], nested), value)
            continue
        arguments[name] = _check(f"{kind.__name__}.{name}", hint, tuple(value) if isinstance(value, list) else value)
    return kind(**arguments)


def _check(name: str, hint: Any, value: Any) -> Any:
    if not _fits(hint, value):
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name}: {shown!r} is not {getattr(hint, '__name__', '') if isinstance(hint, type) else str(hint)}")
    return value


def _fits(kind: Any, value: Any) -> bool:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in options
    if origin is tuple:
        kinds = options[:1] * len(value) if options[-1] is ... and isinstance(value, tuple) else options
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, kinds, value))
    if origin is dict:
        return isinstance(value, dict)
    if options:  # a union
        return any(_fits(option, value) for option in options)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
