"""Store the answers of an evaluation in progress, one line each, so that a killed evaluation continues."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.divergence import Divergence, ItemKey
from benchmarks.model import Finished

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
        """Finished items; an incomplete last line, from a process that was killed, is dropped."""
        if not self._path.exists():
            return {}
        lines = self._path.read_text(encoding="utf-8").split("\n")
        whole, torn = lines[:-1], lines[-1]
        if torn:
            self._path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        items = (_finished(json.loads(line)) for line in whole)
        return {item.key: item for item in items}

    def add(self, items: Sequence[Finished]) -> None:
        text = "".join(json.dumps(asdict(item)) + "\n" for item in items)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


def _finished(line: dict[str, Any]) -> Finished:
    measured = line["divergence"]
    return Finished(
        key=ItemKey(*line["key"]),
        reply=line["reply"],
        divergence=Divergence(**measured) if measured else None,
        failure=line["failure"],
    )
