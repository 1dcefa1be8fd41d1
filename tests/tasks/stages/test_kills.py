"""SIGKILL at any moment of a stage: the same command continues, and its result is the undisturbed one's, bit by bit.

Every run kills the export twice; `make soak` kills all stages, alone and on two ranks. `make hardening` writes a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.forked_stages import complete
from support.kill_series import EXPORT, KILLS, Placement, Victims, Work, plan


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(project, tmp_path_factory.mktemp("whole") / "project")


def selected() -> list[Any]:
    """All works with the number of their kills; two kills of the export are the sample of a run without `soak`."""
    everything = [
        pytest.param(work, ranks, KILLS[ranks], id=f"{work.name}-{ranks}", marks=pytest.mark.soak)
        for work, ranks in plan()
    ]
    return [*everything, pytest.param(EXPORT, 1, 2, id="sample")]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("placement", ["time", "phase"])
@pytest.mark.parametrize(("work", "ranks", "kills"), selected())
def test_a_stage_killed_again_and_again_gives_the_same_bits(
    work: Work, ranks: int, kills: int, placement: Placement, whole: Path, tmp_path: Path
) -> None:
    found = Victims(work, ranks, whole, tmp_path).series(placement, kills)
    assert found.kills == kills
    assert found.faultless, found
