"""Parameters: sections of params.yaml parsed once into frozen dataclasses; unknown keys are refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import ConfigDict, ValidationError, create_model

from tlq.recipes import Recipe, get_recipe

T = TypeVar("T")

PARAMS = Path("params.yaml")


class ParamsError(ValueError):
    """params.yaml cannot be used; the message is one line that names the key and the next step."""


@dataclass(frozen=True)
class ModelParams:
    """The model to quantize.

    Attributes:
        path: checkpoint directory (DVC tracks its content).
        dtype: dtype of computation.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class VariantParams:
    """Every recipe with every scheme."""

    recipes: tuple[str, ...]
    schemes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [f"{recipe}-{scheme}" for recipe in self.recipes for scheme in self.schemes]


def section(name: str, cls: type[T], path: str | Path = PARAMS) -> T:
    """Section ``name`` of a params file as an instance of ``cls``.

    Raises:
        ParamsError: no such section, an unknown or missing key, a value of the wrong type or out of range.
    """
    return parse(name, _read(Path(path)).get(name), cls, path)


def parse(name: str, values: Any, cls: type[T], path: str | Path = PARAMS) -> T:
    """A mapping as an instance of dataclass ``cls``; ``name`` says in errors where it stands."""
    if values is None:
        raise ParamsError(f"{path}: section `{name}` is missing; add it (the README lists every section)")
    try:
        wrapper: Any = _wrapper(cls)  # type: ignore[arg-type]
        return wrapper(value=values).value
    except ValidationError as error:
        raise ParamsError(f"{path}: {_explain(name, error)}") from error


def recipe(name: str, path: str | Path = PARAMS) -> Recipe:
    """Recipe ``name``, with the choices that params.yaml overrides under ``recipes.<name>``.

    Raises:
        ParamsError: an unknown recipe, or a choice that recipes do not have.
    """
    overrides = _read(Path(path)).get("recipes") or {}
    try:
        row, *_ = [get_recipe(each) for each in (name, *overrides)]
    except ValueError as error:
        raise ParamsError(f"{path}: {error}") from error
    own = overrides.get(name) or {}
    if "name" in own:
        raise ParamsError(f"{path}: recipes.{name}.name: a recipe keeps its name, its checkpoints carry it; remove it")
    adapter = _wrapper(Recipe)
    fields = adapter(value=row).model_dump()["value"]
    return parse(f"recipes.{name}", _merge(fields, own), Recipe, path)


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


@cache
def _wrapper(cls: Any) -> Any:
    """A model around a dataclass: stdlib dataclasses inherit its refusal of unknown keys, nested ones too."""
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", strict=False), value=(cls, ...))


def _explain(name: str, error: ValidationError) -> str:
    details = []
    for item in error.errors():
        place = ".".join([name, *(str(part) for part in item["loc"][1:])])
        message = {
            "unexpected_keyword_argument": "unknown key; remove it or correct its spelling",
            "extra_forbidden": "unknown key; remove it or correct its spelling",
            "missing": "required key is missing; add it",
        }.get(item["type"], item["msg"].removeprefix("Value error, "))
        found = f" (found {item['input']!r})" if item["type"].endswith(("_type", "_parsing", "_error")) else ""
        details.append(f"{place}: {message}{found}")
    return "; ".join(details)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: not found; run from the project's top folder") from error
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: must be a mapping of sections")
    return content
