"""The journal of an evaluation in progress."""

from pathlib import Path

import pytest

from benchmarks.divergence import Divergence, ItemKey
from benchmarks.items import Finished
from benchmarks.journal import Journal

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


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("place", [3, 70, -3])
def test_a_damaged_line_is_asked_again(
    tmp_path: Path, damaged: int, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit of the digest or of the answer, which may be good JSON or good UTF-8 no longer."""
    Journal(tmp_path, "same").add(ITEMS)
    path = tmp_path / "answers.jsonl"
    lines = [bytearray(line) for line in path.read_bytes().split(b"\n")]
    lines[damaged][place] ^= 0x80
    path.write_bytes(b"\n".join(lines))
    journal = Journal(tmp_path, "same")
    kept = [item for number, item in enumerate(ITEMS) if number != damaged]
    assert journal.read() == {item.key: item for item in kept}
    assert "answers.jsonl: 1 lines are damaged; their items are asked again" in caplog.text
    journal.add([ITEMS[damaged]])
    assert journal.read() == {item.key: item for item in ITEMS}


def test_another_fingerprint_starts_over(tmp_path: Path) -> None:
    Journal(tmp_path, "one").add(ITEMS)
    assert Journal(tmp_path, "two").read() == {}
    assert Journal(tmp_path, "one").read() == {}
