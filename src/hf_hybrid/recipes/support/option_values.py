"""Checks values from mappings and option files against the types of the dataclass fields."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin


class _Refused(Exception):
    """The value does not have this type."""


def option_value(field: Field, hint: Any, value: Any) -> Any:
    """The value for a field, in its declared type.

    Numbers may be given as text, because YAML reads `5e-4` as text; an integer may be given for a float, and a single
    item for a list. YAML reads a bare `no` as false; this is corrected where "no" is among the choices.

    Args:
        field: field of a dataclass; `choices` in its metadata restrict the value.
        hint: resolved type of the field.
        value: value as given.

    Raises:
        ValueError: the value has another type, or is not one of the choices.
    """
    choices = field.metadata.get("choices")
    if choices is not None:
        hint = Literal[tuple(choices)] | None if type(None) in get_args(hint) else Literal[tuple(choices)]
    accepted = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in accepted):
        accepted = tuple(kind for kind in accepted if kind is not str)  # the text of an Enum is one of its values
    for convert in (_exact, _converted):
        for kind in accepted:
            try:
                return convert(kind, value)
            except _Refused:
                continue
    known = " or ".join(dict.fromkeys(_description(kind) for kind in accepted))
    raise ValueError(f"`{field.name}` must be {known}; got {_shown(value)}.{_remedy(field, accepted, value)}")


def _remedy(field: Field, accepted: Sequence[Any], value: Any) -> str:
    if str in accepted and isinstance(value, Real):
        return " In YAML, put text that looks like a number or a truth value in quotes."
    if field.default is not MISSING:
        default = field.default.value if isinstance(field.default, Enum) else field.default
        return f" Leave it out for its default, {default!r}."
    return f" {field.metadata['help']}" if "help" in field.metadata else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _exact(kind: Any, value: Any) -> Any:
    """The value, if it has exactly this type."""
    origin = get_origin(kind) or kind
    if kind is Any or (origin is Literal and any(value is item or _same(value, item) for item in get_args(kind))):
        return value
    if origin is not Literal and isinstance(origin, type):
        if type(value) is origin or (isinstance(value, origin) and origin not in (int, float, str, list, dict)):
            return _items(kind, value) if origin is list else value
    raise _Refused


def _same(value: Any, item: Any) -> bool:
    return type(value) is type(item) and value == item


def _converted(kind: Any, value: Any) -> Any:
    """The value converted to this type, if the conversion is lossless."""
    origin = get_origin(kind) or kind
    if origin is Literal or (isinstance(origin, type) and issubclass(origin, Enum)):
        return _chosen(kind, value)
    if origin is bool:
        return _truth(value)
    if origin in (int, float):
        return _number(origin, value)
    if origin is str and isinstance(value, (os.PathLike, str)):
        return os.fspath(value)
    if origin is list:
        return _items(kind, [value] if isinstance(value, (str, os.PathLike, Real)) else value)
    if origin is dict:
        return _mapping(value)
    raise _Refused


def _chosen(kind: Any, value: Any) -> Any:
    is_enum = isinstance(kind, type)
    items = {item.value if is_enum else item: item for item in (kind if is_enum else get_args(kind))}
    if value is False and "no" in items:
        return items["no"]
    if isinstance(value, str) and value in items:
        return items[value]
    raise _Refused


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise _Refused


def _number(kind: type, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise _Refused
    try:
        if kind is float:
            return float(value)
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
            return int(value)
        number = float(value)  # 1e3, which YAML may read as text, is also an integer
    except ValueError:
        raise _Refused from None
    if not math.isfinite(number) or number != int(number):
        raise _Refused
    return int(number)


def _items(kind: Any, value: Any) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _Refused
    (item_kind,) = get_args(kind) or (Any,)
    items = []
    for item in value:
        try:
            items.append(_exact(item_kind, item))
        except _Refused:
            items.append(_converted(item_kind, item))
    return items


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise _Refused from None
    if not isinstance(value, Mapping):
        raise _Refused
    return dict(value)


def _description(kind: Any) -> str:
    origin = get_origin(kind) or kind
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    if origin in names:
        return names[origin]
    if origin is type(None):
        return "null (None)"
    if origin is list:
        (item_kind,) = get_args(kind) or (Any,)
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"a list of {plural[item_kind]}" if item_kind in plural else "a list"
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(repr(item.value) for item in kind)}"
    return getattr(kind, "__name__", str(kind))
