"""An editor of params.yaml that keeps comments and layout (ruamel.yaml's round trip)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

#: Line width at which YAML would break a line; large, so that a row of params.yaml stays on one line.
_LINE_WIDTH = 1000


class EditError(ValueError):
    """The file has no place for a value; the message names the key."""


class ParamsEditor:
    """Edit the text of a params file.

    Attributes:
        sections: the content, with its comments.
    """

    def __init__(self, text: str) -> None:
        self.sections: CommentedMap = round_trip().load(text)

    @property
    def text(self) -> str:
        stream = io.StringIO()
        round_trip().dump(self.sections, stream)
        return stream.getvalue()

    def set(self, name: str, value: Any) -> None:
        """Set the value of a dotted name, and create missing keys below its section.

        Raises:
            EditError: the file has no such section, or the name continues below a plain value.
        """
        *path, key = name.split(".")
        if not path or path[0] not in self.sections:
            raise EditError(f"{name}: no such section in params.yaml; choose one of {', '.join(self.sections)}")
        mapping = self.sections
        for part in path:
            mapping = mapping.setdefault(part, CommentedMap())
            if not isinstance(mapping, CommentedMap):
                raise EditError(f"{name}: {part} is a plain value in params.yaml; name it without what follows")
        mapping[key] = value

    def update(self, section: str, values: Mapping[str, Any]) -> None:
        """Set ``values`` in a section and merge nested mappings; other keys stay."""
        _update(self._section(section), values)

    def replace(self, section: str, values: Mapping[str, Any]) -> None:
        """Set ``values`` in a section and remove its other keys."""
        mapping = self._section(section)
        self.remove(section, [key for key in mapping if key not in values])
        _update(mapping, values, nested=False)

    def remove(self, section: str, keys: Iterable[str]) -> None:
        """Remove keys of a section; a comment after the last key, which belongs to the next section, stays."""
        mapping = self._section(section)
        for key in keys:
            last = list(mapping)[-1] == key
            comment = mapping.ca.items.pop(key, None)
            del mapping[key]
            if last and comment is not None and mapping:
                mapping.ca.items[list(mapping)[-1]] = comment

    def _section(self, name: str) -> CommentedMap:
        mapping = self.sections.setdefault(name, CommentedMap())
        if not isinstance(mapping, CommentedMap):
            raise EditError(f"{name}: a plain value in params.yaml, must be a section")
        return mapping


def _update(mapping: CommentedMap, values: Mapping[str, Any], nested: bool = True) -> None:
    """Set ``values``; with ``nested``, mappings inside mappings are updated and not replaced.

    A new key goes after its predecessor in ``values``, except that it goes before the last key of the mapping, whose
    trailing comment belongs to the next section.
    """
    place = len(mapping)
    for key, value in values.items():
        old = mapping.get(key)
        if key not in mapping:
            mapping.insert(min(place, max(len(mapping) - 1, 0)), key, value)
        elif nested and isinstance(value, dict) and isinstance(old, CommentedMap):
            _update(old, value)
        elif old != value:
            mapping[key] = value
        place = list(mapping).index(key) + 1


def row(**values: Any) -> CommentedMap:
    """A mapping that is written on one line: `{key: value}`."""
    mapping = CommentedMap(values)
    mapping.fa.set_flow_style()
    return mapping


def round_trip() -> YAML:
    """YAML that keeps comments, in the layout of params.yaml."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = _LINE_WIDTH
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _null)
    return yaml


def _null(representer: Any, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")
