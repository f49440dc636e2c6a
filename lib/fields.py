"""Fields of dataclasses that users fill in, checked against the types that they declare."""

from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

NUMBERS = {float: (Real, "a number"), int: (Integral, "an integer")}
NAMES = {str: "a string", bool: "True or False", NoneType: "None"}


def check_fields(instance: Any) -> None:
    """Raise ValueError, naming the field, unless all values have the types declared.

    Parameters
    ----------
    instance : dataclass
        Numbers may be of any kind, numpy's too; a whole number given as a float becomes an
        integer where one is declared. What cannot be told (containers of others) is not checked.
    """
    kinds = _types(type(instance))
    for field in fields(instance):
        value, kind = getattr(instance, field.name), kinds.get(field.name, Any)
        if kind is int and isinstance(value, float) and value.is_integer():
            object.__setattr__(instance, field.name, int(value))
        elif not _fits(value, kind):
            raise ValueError(f"{field.name} must be {_named(kind)}, not {shortened(value)}")


def _types(owner: type) -> dict[str, Any]:
    try:
        return get_type_hints(owner)
    except NameError:  # types that a user declared where they cannot be looked up from here
        return {}


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind][0]) and not isinstance(value, bool)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple and inner[-1:] == (...,):
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    if origin is Callable:
        return callable(value)
    return isinstance(value, origin or kind) if isinstance(origin or kind, type) else True


def _named(kind: Any) -> str:
    if kind in NUMBERS:
        return NUMBERS[kind][1]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_named(each) for each in inner)
    if origin is tuple:
        return "a tuple of " + _named(inner[0]).split(" ", 1)[-1] + "s"
    if origin is Callable:
        return "a function"
    return NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")
