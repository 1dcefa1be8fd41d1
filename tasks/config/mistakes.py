"""Turn each error of pydantic into one line: `section.key: what is wrong (found ...)`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ErrorDetails

#: Requirement on the value, with its bound, by pydantic's type of error.
_BOUNDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "too_short": "must have at least {min_length} entry",
    "literal_error": "must be {expected}",
}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def explain(name: str, error: ValidationError, cls: Any) -> str:
    """Describe every mistake in the values of ``cls``, which the file has under ``name``.

    Args:
        error: validation error of a model whose only field is an instance of ``cls``.
    """
    return "; ".join(_line(name, item, cls, item["loc"][1:]) for item in error.errors())


def _line(name: str, item: ErrorDetails, cls: Any, location: Sequence[int | str]) -> str:
    kind = item["type"]
    place = ".".join([name, *(str(part) for part in location if part not in _tags(item))])
    if kind in _UNKNOWN:
        return (
            f"{place}: unknown key; correct its spelling or remove it (known: {', '.join(_keys(cls, location[:-1]))})"
        )
    if kind in ("missing", "missing_argument"):
        return f"{place}: required key is missing; add it"
    if kind == "value_error":
        return _of_check(place, item["msg"].removeprefix("Value error, "), _keys(cls, location))
    wanted = _BOUNDS[kind].format(**item["ctx"]) if kind in _BOUNDS else item["msg"].replace("Input should", "must")
    return f"{place}: {wanted} (found {item['input']!r})"


def _of_check(place: str, message: str, keys: Sequence[str]) -> str:
    """The message of a class's own check; if it begins with a key (`points is 1, must be ...`), the place joins it."""
    found = re.fullmatch(r"(?:\w+\.)*(\w+) (is .*)", message, re.DOTALL)
    if found is None or found[1] not in keys:
        return f"{place}: {message}"
    return f"{place}.{found[1]} {found[2]}"


def _tags(item: ErrorDetails) -> set[str]:
    """Parts of a location that name a member of a union, not a key: pydantic writes `int` or `literal['auto']`."""
    return {part for part in item["loc"] if isinstance(part, str) and (part in _PLAIN or part.startswith("literal["))}


_PLAIN = frozenset({"int", "constrained-int", "str", "float", "bool"})


def _keys(cls: Any, location: Sequence[int | str]) -> list[str]:
    """Keys of the mapping at ``location`` inside ``cls``; empty without a mapping."""
    for part in location:
        cls = _inside(_mapping(cls), part)
    return list(types_of(_mapping(cls)))


def _inside(cls: Any, part: int | str) -> Any:
    """The type of a key of a section, or of an entry of a list or dictionary."""
    if get_origin(cls) is not None:
        return get_args(cls)[-1] if issubclass(get_origin(cls), Mapping) else get_args(cls)[0]
    return types_of(cls).get(str(part))


def _mapping(annotation: Any) -> Any:
    """The section, dataclass, list or dictionary that an annotation such as `X | None` allows."""
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return annotation.model_fields["root"].annotation
    if isinstance(get_origin(annotation), type) and get_origin(annotation) in (dict, tuple, list):
        return annotation
    members = [member for member in get_args(annotation) if types_of(member)]
    return members[0] if members else annotation


def types_of(cls: Any) -> dict[str, Any]:
    """Types by key of a section or a dataclass; empty for any other type."""
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        return {name: field.annotation for name, field in cls.model_fields.items()}
    if isinstance(cls, type) and is_dataclass(cls):
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in fields(cls)}
    return {}


def reason_of(error: Exception) -> str:
    """Error of a hub client on one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
