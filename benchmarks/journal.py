"""Store the answers of an evaluation in progress, one line each, so that a killed evaluation continues.

A line is the SHA-256 of the answer's JSON, a blank, and the JSON.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.divergence import Divergence, ItemKey
from benchmarks.items import Finished
from tlq.runtime.files import new_file

logger = logging.getLogger(__name__)


class Journal:
    """Lines in ``folder``, valid for one fingerprint of items, parameters and model.

    A folder with another fingerprint is emptied, because its answers belong to other questions or another model.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._path = folder / "answers.jsonl"
        stamp = folder / "fingerprint"
        if not (stamp.is_file() and stamp.read_text() == fingerprint):
            if folder.exists():
                logger.info("%s: answers of other params, data or model; starting over", folder)
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            stamp.write_text(fingerprint)

    def read(self) -> dict[ItemKey, Finished]:
        """Finished items. Lines that do not match their digest are dropped, with a warning.

        An incomplete last line, from a process that was killed, is dropped without one.
        """
        if not self._path.exists():
            return {}
        lines = self._path.read_bytes().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        sound = [line for line in whole if line == _line(line.partition(b" ")[2])]
        if len(sound) < len(whole):
            logger.warning("%s: %d lines are damaged; their items are asked again", self._path, len(whole) - len(sound))
        if torn or len(sound) < len(whole):
            with new_file(self._path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in sound))
        items = (_finished(line) for line in sound)
        return {item.key: item for item in items}

    def add(self, items: Sequence[Finished]) -> None:
        text = b"".join(_line(json.dumps(asdict(item)).encode()) + b"\n" for item in items)
        with self._path.open("ab") as file:
            file.write(text)


def _line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b" " + content


def _finished(stored: bytes) -> Finished:
    """The item of a line with its digest."""
    line: dict[str, Any] = json.loads(stored.partition(b" ")[2])
    measured = line["divergence"]
    return Finished(
        key=ItemKey(*line["key"]),
        reply=line["reply"],
        divergence=Divergence(**measured) if measured else None,
        failure=line["failure"],
    )
