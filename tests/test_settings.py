"""Settings: values that are checked where they are defined, and mistakes that are one line with the key."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import field
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from gladad.core.errors import ConfigError
from gladad.core.settings import from_json, parse_assignments, to_json, validated, with_values


@validated
class Oven:
    method: Literal["oven"] = "oven"
    minutes: Annotated[int, Field(ge=1, le=90)] = 30
    shelves: tuple[Annotated[int, Field(ge=0)], ...] = (1, 2)


@validated
class Pan:
    method: Literal["pan"] = "pan"
    heat: Annotated[float, Field(gt=0)] = 0.5
    minutes: Annotated[int, Field(ge=1)] = 5


@validated
class Topping:
    name: str
    grams: float = 10.0


@validated
class Meal:
    title: str = "a meal"
    guests: Annotated[int, Field(ge=1)] | None = None
    hot: bool = True
    cook: Annotated[Oven | Pan, Field(discriminator="method")] = field(default_factory=Oven)
    sauce: Topping | None = None
    toppings: tuple[Topping, ...] = ()

    def __post_init__(self) -> None:
        if self.sauce is not None and not self.hot:
            raise ConfigError("sauce and hot: a cold meal has no sauce")


def mistake(function: Any, *arguments: Any, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FULL = Meal(title="ü", guests=3, cook=Pan(heat=0.25), sauce=Topping(name="mint"), toppings=(Topping(name="salt"), Topping(name="nuts")))


@pytest.mark.parametrize("meal", [Meal(), FULL])
def test_json_there_and_back(meal: Meal) -> None:
    plain = to_json(meal)
    assert from_json(Meal, plain) == meal == from_json(Meal, json.loads(json.dumps(plain))) == with_values(Meal(), plain)
    assert from_json(Meal, {}) == Meal()


def test_settings_are_frozen_and_named() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.title = "another"  # type: ignore[misc]
    assert dataclasses.replace(FULL, guests=4).guests == 4
    assert "positional" in mistake(Meal, "a title")


WRONG = {
    "near name": ({"titel": 1}, "titel: unknown setting; near are title"),
    "no near name": ({"x": 1}, "x: unknown setting; known are cook, guests, hot, sauce, title, toppings"),
    "nested": ({"cook": {"method": "oven", "minute": 3}}, "cook.minute: unknown setting; near are minutes"),
    "of another method": ({"cook": {"method": "oven", "heat": 1.0}}, "cook.heat: unknown setting; known are method, minutes, shelves"),
    "optional": ({"sauce": {"nam": "x"}}, "sauce.nam: unknown setting; near are name"),
    "in a tuple": ({"toppings": [{"name": "a"}, {"name": "b", "gram": 2}]}, "toppings.1.gram: unknown setting; near are grams"),
    "text for a number": ({"guests": "three"}, "guests: input should be a valid integer, not 'three'"),
    "number for text": ({"title": 3}, "title: input should be a valid string, not 3"),
    "number for a truth": ({"hot": 1}, "hot: input should be a valid boolean, not 1"),
    "truth for a number": ({"cook": {"method": "oven", "minutes": True}}, "cook.minutes: input should be a valid integer, not True"),
    "fraction": ({"guests": 1.5}, "guests: input should be a valid integer, not 1.5"),
    "too small": ({"guests": 0}, "guests: input should be greater than or equal to 1, not 0"),
    "too large": ({"cook": {"method": "oven", "minutes": 91}}, "cook.minutes: input should be less than or equal to 90, not 91"),
    "of an item": ({"cook": {"method": "oven", "shelves": [0, -1]}}, "cook.shelves.1: input should be greater than or equal to 0, not -1"),
    "in an item": ({"toppings": [{"name": "a", "grams": "b"}]}, "toppings.0.grams: input should be a valid number, not 'b'"),
    "not a number": ({"cook": {"method": "pan", "heat": float("nan")}}, "cook.heat: input should be a finite number, not nan"),
    "missing": ({"toppings": [{"grams": 1.0}]}, "toppings.0.name: is missing"),
    "no table": ({"sauce": 3}, "sauce: "),
    "no method": ({"cook": {"method": "grill"}}, "cook.method: must be one of 'oven', 'pan', not 'grill'"),
    "together": ({"hot": False, "sauce": {"name": "x"}}, "sauce and hot: a cold meal has no sauce"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_that_begins_with_the_key(case: str) -> None:
    values, message = WRONG[case]
    assert mistake(from_json, Meal, values).startswith(message)
    assert mistake(with_values, Meal(), values).startswith(message)


def test_mistakes_in_python_are_told_in_the_same_way() -> None:
    assert mistake(Oven, minuts=3) == "minuts: unknown setting; near are minutes"
    assert mistake(Oven, minutes="3") == "minutes: input should be a valid integer, not '3'"
    assert mistake(Topping) == "name: is missing"
    assert mistake(dataclasses.replace, Oven(), minutes=0) == "minutes: input should be greater than or equal to 1, not 0"
    assert mistake(from_json, Oven, [1]).startswith("Oven: ")


DATES = {
    "guests = 2001-02-03": "guests: ",
    "title = 2001-02-03T04:05:06": "title: ",
    "[cook]\nmethod = 'oven'\nminutes = 04:05:06": "cook.minutes: ",
    "[[toppings]]\nname = 'a'\n[[toppings]]\nname = 2001-02-03": "toppings.1.name: ",
}


@pytest.mark.parametrize("text", DATES)
def test_what_toml_has_and_json_has_not_is_refused_by_its_key(text: str) -> None:
    values = tomllib.loads(text)
    for function, start in ((from_json, Meal), (with_values, Meal())):
        assert mistake(function, start, values).startswith(DATES[text])


def test_dotted_and_nested_names_are_the_same() -> None:
    dotted = with_values(FULL, {"cook.heat": 0.75, "sauce.grams": 2.0, "guests": None})
    assert dotted == with_values(FULL, {"cook": {"heat": 0.75}, "sauce": {"grams": 2.0}, "guests": None})
    assert dotted == dataclasses.replace(FULL, cook=Pan(heat=0.75), sauce=Topping(name="mint", grams=2.0), guests=None)
    assert with_values(Meal(), {"sauce.name": "mint"}).sauce == Topping(name="mint")  # unset before
    assert with_values(Meal(), {"toppings": [{"name": "salt"}]}).toppings == (Topping(name="salt"),)
    assert with_values(FULL, {}) == FULL


def test_dotted_names_that_are_not_there() -> None:
    assert mistake(with_values, Meal(), {"cock.minutes": 3}) == "cock: unknown setting; near are cook"
    assert mistake(with_values, Meal(), {"cook.minuts": 3}) == "cook.minuts: unknown setting; near are minutes"
    assert mistake(with_values, Meal(), {"guests.number": 3}).startswith("guests: input should be a valid integer")
    assert mistake(with_values, Meal(), {"sauce.taste.salt": 3}).startswith("sauce.taste: unknown setting; known are ")


@pytest.mark.parametrize("first", ["cook.method", "cook.heat"])
def test_another_method_takes_none_of_the_present_ones_values(first: str) -> None:
    values = {"cook.method": "pan", "cook.heat": 0.25}
    start = Meal(cook=Oven(minutes=45))
    assert with_values(start, dict(sorted(values.items(), key=lambda item: item[0] != first))).cook == Pan(heat=0.25)  # not 45 minutes
    assert with_values(start, {"cook": {"heat": 0.25, "method": "pan"}}).cook == Pan(heat=0.25)
    assert with_values(start, {"cook.method": "oven", "cook.shelves": [3]}).cook == Oven(minutes=45, shelves=(3,))  # the same: they stay


def test_assignments_of_the_command_line() -> None:
    texts = ["a.b=3", "c=true", "d = x=y", "e=", "f=[1, 2]", 'g="3"', "h=null", "i=some/path", "j=1e-3"]
    parsed = {"a.b": 3, "c": True, "d": " x=y", "e": "", "f": [1, 2], "g": "3", "h": None, "i": "some/path", "j": 1e-3}
    assert parse_assignments(texts) == parsed
    assert parse_assignments([]) == {}
    for text in ("steps", "=3", ""):
        assert mistake(parse_assignments, [text]) == f"{text!r}: write a setting as NAME=VALUE, such as training.steps=900"
