"""Read params.yaml: sections as instances of their classes, recipes with their overrides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    ValidationError,
    create_model,
)

from tasks.config.mistakes import explain
from tasks.config.sections import SECTIONS, RecipesParams, Section
from tlq.recipes import Recipe, get_recipe

T = TypeVar("T")

PARAMS = Path("params.yaml")


class ParamsError(ValueError):
    """params.yaml cannot be used; the message is one line that names the key and the next step."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever keys and values hold


#: Numbers from here on do not fit the integers of the libraries.
_NUMBERS_END = 2**63


def section(name: str, cls: type[T], path: str | Path = PARAMS) -> T:
    """Section ``name`` of a params file as an instance of ``cls``.

    Raises:
        ParamsError: the section is missing, a key is unknown or missing, or a value has a wrong type or range.
    """
    return parse(name, read(path).get(name), cls, path)


def parse(name: str, values: Any, cls: type[T], path: str | Path = PARAMS) -> T:
    """``values`` as an instance of ``cls``; ``name`` is their dotted name in errors."""
    if values is None:
        raise ParamsError(f"{path}: section `{name}` is missing; add it (docs/parameters.md lists every section)")
    for place, number in _numbers(name, values):
        if not math.isfinite(number) or abs(number) >= _NUMBERS_END:
            raise ParamsError(f"{path}: {place} is {number}, must be a number below 2^63")
    try:
        wrapper: Any = _wrapper(cls)  # type: ignore[arg-type]
        return wrapper(value=values).value
    except ValidationError as error:
        raise ParamsError(f"{path}: {explain(name, error, cls)}") from error


def _numbers(place: str, values: Any) -> Iterator[tuple[str, int | float]]:
    """Every number in nested values, with its dotted place."""
    if isinstance(values, int | float):
        yield place, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _numbers(f"{place}.{key}", value)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _numbers(f"{place}.{index}", value)


@cache
def _wrapper(cls: Any) -> Any:
    """A model with one field, from which a stdlib dataclass inherits the refusal of unknown keys."""
    return create_model(cls.__name__, __base__=Section, value=(cls, ...))


def read_recipe(name: str, path: str | Path = PARAMS) -> Recipe:
    """Recipe ``name`` with the values under ``recipes.<name>`` in params.yaml.

    Raises:
        ParamsError: the recipe or one of the keys is unknown.
    """
    overrides = parse("recipes", read(path).get("recipes") or {}, RecipesParams, path).root
    try:
        row, *_ = [get_recipe(each) for each in (name, *overrides)]
    except ValueError as error:
        raise ParamsError(f"{path}: {error}") from error
    choices = overrides.get(name, {})
    if "name" in choices:
        raise ParamsError(f"{path}: recipes.{name}.name: a recipe cannot be renamed; remove the key")
    return parse(f"recipes.{name}", _merge(asdict(row), choices), Recipe, path)


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated with ``overrides``; nested mappings are merged."""
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


class UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself takes the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name} stands twice in one mapping; remove one of them", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read(path: str | Path = PARAMS) -> dict[str, Any]:
    """Every section of a params file as plain values.

    Raises:
        ParamsError: the file is missing or not a YAML mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(), UniqueKeys)
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: is no UTF-8 text ({error}); save it as UTF-8") from error
    except RecursionError as error:
        raise ParamsError(f"{path}: is nested too deeply; remove levels") from error
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: not found; run from the project's top folder") from error
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: must be a mapping of sections")
    for name in content.keys() - SECTIONS.keys():
        if near := get_close_matches(str(name), SECTIONS.keys() - content.keys(), n=1, cutoff=0.8):
            raise ParamsError(f"{path}: section `{name}` is unknown, and `{near[0]}` is missing; rename it")
    return content
