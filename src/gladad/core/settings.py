"""Settings as frozen dataclasses that pydantic validates where they are defined: the constructor's signature is the schema.

What is wrong with a value is one `ConfigError` of one line that names the key, whether it came from Python, JSON, TOML or the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gladad.core.errors import ConfigError

Settings = TypeVar("Settings")
METHOD = "method"  # the field that tells which of several settings classes a table of settings is of
UNKNOWN = "unexpected_keyword_argument"
_adapter: Any = functools.lru_cache(TypeAdapter)
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
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def from_json(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build settings from what `to_json` gave; missing keys keep their defaults.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or out of range.
    """
    try:
        made: Settings = _adapter(kind).validate_json(_dumps(values))
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
        for part in path:
            if not isinstance(node.get(part), dict):  # unset so far, or unknown
                node[part] = {}
            node = node[part]
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


def _dumps(value: Any, name: str = "") -> str:
    """JSON text; what JSON has no form for, such as a date of TOML, is named."""
    try:
        return json.dumps(value)
    except TypeError:
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ():
            _dumps(part, f"{name}.{key}" if name else str(key))
        raise ConfigError(f"{name}: input should be a number, a text, a list or a table, not a {type(value).__name__}") from None


def _sentence(error: ValidationError, kind: Any) -> str:
    """One mistake in one line that names the key; unknown keys come before what may follow from them."""
    mistake = min(error.errors(include_url=False), key=lambda one: one["type"] != UNKNOWN)
    place = [str(part) for part in mistake["loc"]]
    kinds, path = [kind], []
    for part in place[:-1] if mistake["type"] == UNKNOWN else place:
        if part.isdigit() or not kinds or any(part in _names(one) for one in kinds):
            path.append(part)
            kinds = kinds if part.isdigit() else [inner for one in kinds for inner in _nested(typing.get_type_hints(one).get(part))]
        else:  # it tells which one of several kinds of settings was meant
            kinds = [one for one in kinds if getattr(one, METHOD, None) == part] or kinds
    if mistake["type"] == UNKNOWN:
        known = sorted({name for one in kinds for name in _names(one)})
        near = difflib.get_close_matches(place[-1], known, 3) or known
        said = f"unknown setting; {'near are' if len(near) < len(known) else 'known are'} {', '.join(near)}"
        path.append(place[-1])
    elif mistake["type"] == "missing":
        said = "is missing"
    elif mistake["type"] == "union_tag_invalid":
        path.append(METHOD)
        said = f"must be one of {mistake['ctx']['expected_tags']}, not {mistake['ctx']['tag']!r}"
    else:
        said = f"{mistake['msg'][:1].lower()}{mistake['msg'][1:]}, not {mistake['input']!r}"
    return f"{'.'.join(path) or kind.__name__}: {said}".replace("\n", " ")


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _nested(hint: Any) -> list[Any]:
    """The settings classes that a type names."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [kind for option in typing.get_args(hint) for kind in _nested(option)]
