"""The journal of an evaluation in progress."""

from pathlib import Path

import pytest

from benchmarks.divergence import Divergence, ItemKey
from benchmarks.journal import Journal
from benchmarks.model import Finished

ITEMS = [
    Finished(ItemKey("a", "1"), "yes\n\u2028 no", Divergence(2, 0.5, 0.1)),
    Finished(ItemKey("a", "2"), "", Divergence(1, 0.5, None)),
    Finished(ItemKey("b", "1"), failure="image cannot be decoded"),
]


def test_added_items_are_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "full", "same")
    assert journal.read() == {}
    journal.add(ITEMS[:1])
    journal.add(ITEMS[1:])
    assert Journal(tmp_path / "full", "same").read() == {item.key: item for item in ITEMS}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    Journal(tmp_path, "same").add(ITEMS)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(tmp_path, "same")
    assert journal.read() == {item.key: item for item in ITEMS[:2]}
    journal.add(ITEMS[2:])
    assert journal.read() == {item.key: item for item in ITEMS}


def test_another_fingerprint_starts_over(tmp_path: Path) -> None:
    Journal(tmp_path, "one").add(ITEMS)
    assert Journal(tmp_path, "two").read() == {}
    assert Journal(tmp_path, "one").read() == {}
