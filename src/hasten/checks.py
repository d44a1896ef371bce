"""Checks of plain data from users: each raises a RecipeError that says what was found and what was expected.

Knows no recipe: steps.py and recipe.py say what they hold.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from hasten.errors import RecipeError

T = TypeVar("T")


def did_you_mean(found: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """The end of a message on an unknown name: the nearest of `known`, and `listed` (else `known`) to choose from."""
    close = difflib.get_close_matches(found, list(known), n=1)
    meant = f": did you mean '{close[0]}'?" if close else ","
    return f"{meant} expected one of {', '.join(listed or known)}" + ("" if listed is None else ", a name or a glob")


def build(kind: type[T], name: str, body: object) -> T:
    """The dataclass `kind` from plain data, called `name` in errors."""
    data = mapping(name, body)
    known_keys(name, data, [item.name for item in fields(kind)])  # type: ignore[arg-type]
    try:
        return kind(**data)
    except TypeError as error:  # a key without a default was left out
        raise RecipeError(f"{name}: {str(error).split('__init__() ')[-1]}") from None


def mapping(what: str, data: object) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        found = "empty" if data is None else type(data).__name__
        raise RecipeError(f"{what} is {found}, expected names and values")
    return dict(data)


def known_keys(what: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"unknown key '{key}' in {what}{did_you_mean(str(key), known)}")


def names(key: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise RecipeError(f"{key} is {value!r}, expected a list of names such as [Linear]")
    return tuple(items)


def string(key: str, value: object, expected: str) -> None:
    """A string, or None."""
    if value is not None and not isinstance(value, str):
        raise RecipeError(f"{key} is {value!r}, expected {expected}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def choose(key: str, value: object, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise RecipeError(f"{key} is {value!r}{did_you_mean(str(value), known)}")


def flag(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{key} is {value!r}, expected true or false")


def count(key: str, value: object, least: int = 1) -> None:
    if not is_int(value) or int(value) < least:  # type: ignore[call-overload]
        raise RecipeError(f"{key} is {value!r}, expected a whole number of at least {least}")


def number(key: str, value: object, above: float, below: float, *, closed: bool = True) -> None:
    """A number of [above, below], or of (above, below) where not closed."""
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if fine:
        fine = above <= value <= below if closed else above < value < below  # type: ignore[operator]
    if not fine:
        between = f"{above:g} to {below:g}" if closed else f"above {above:g} and below {below:g}"
        raise RecipeError(f"{key} is {value!r}, expected a number {'of ' if closed else ''}{between}")
