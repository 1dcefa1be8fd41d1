"""Generate the reference of parameters and environment variables.

python -m tasks.config.tables > docs/parameters.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic_core import PydanticUndefined

from tasks.config.environment import VARIABLES
from tasks.config.mistakes import types_of
from tasks.config.sections import SECTIONS, Download

_TOP = """# Parameters

[All pages](README.md)

This page is generated from `tasks/config/sections.py` and `tasks/config/environment.py`: change them, then run
`python -m tasks.config.tables > docs/parameters.md`.

`params.yaml` holds every value that decides a result. An unknown key is refused.
"""

_VARIABLES = """## Environment variables

They decide where and how a stage runs, never its result.

| variable | read by | meaning | default |
|---|---|---|---|
"""


def page() -> str:
    """The page docs/parameters.md."""
    parts = [_TOP, *(_section(name, cls) for name, cls in SECTIONS.items())]
    rows = [f"| `{v.name}` | {v.readers} | {v.meaning} | {v.default} |\n" for v in VARIABLES.values()]
    return "\n".join([*parts, _VARIABLES + "".join(rows)])


def _section(name: str, cls: type[BaseModel]) -> str:
    title = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
    if issubclass(cls, RootModel) and name != "fetch":
        return f"## `{name}`\n\n{title}\n"
    rows = _rows("fetch.<name>.", Download) if name == "fetch" else _rows(f"{name}.", cls)
    table = "".join(f"| `{key}` | {kind} | {default} | {meaning} |\n" for key, kind, default, meaning in rows)
    return f"## `{name}`\n\n{title}\n\n| parameter | values | default | meaning |\n|---|---|---|---|\n{table}"


def _rows(prefix: str, cls: Any) -> Iterator[tuple[str, str, str, str]]:
    """Dotted name, values, default and meaning of every key, including the keys of nested sections."""
    for name, annotation in types_of(cls).items():
        if types_of(annotation):
            yield from _rows(f"{prefix}{name}.", annotation)
        else:
            default, meaning = _facts(cls, name)
            yield f"{prefix}{name}", _values(annotation), default, meaning.replace("|", "\\|")


def _facts(cls: Any, name: str) -> tuple[str, str]:
    """Default and meaning of a key."""
    if is_dataclass(cls):
        (field,) = [field for field in fields(cls) if field.name == name]
        return _default(field.default, MISSING), _documented(cls).get(name, "")
    field = cls.model_fields[name]
    default = field.default_factory() if field.default_factory else field.default
    return _default(default, PydanticUndefined), field.description


def _default(value: Any, missing: Any) -> str:
    if value is missing:
        return "required"
    if isinstance(value, tuple):
        value = list(value)
    return "null" if value is None else f"`{value}`" if value != "" else "empty"


def _documented(cls: Any) -> dict[str, str]:
    """Meanings of a dataclass's fields, from the section `Attributes` of its docstring."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n(?:      .*|$))*)", text, re.MULTILINE)
    return {
        name: " ".join(meaning.split()).removesuffix(".") for names, meaning in entries for name in names.split(", ")
    }


def _values(annotation: Any) -> str:
    """The values that a key may have, in words."""
    arguments = get_args(annotation)
    if not arguments:
        return {"str": "text", "int": "integer", "float": "number", "bool": "true, false"}.get(
            annotation.__name__, "mapping"
        )
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is tuple:
        return f"list of {_values(arguments[0])}" if not types_of(arguments[0]) else "list of mappings"
    if all(isinstance(each, str) for each in arguments):
        return ", ".join(f"`{each}`" for each in arguments)
    if hasattr(annotation, "__metadata__"):
        return _values(arguments[0])
    return ", ".join(_values(each) for each in arguments if each is not type(None))


if __name__ == "__main__":
    sys.stdout.write(page())
