"""Unfinished work is continued only with the parameters that it was begun with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tlq.recipes import get_recipe
from tlq.runtime.resume import ResumeState


def test_state_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    state = ResumeState(tmp_path / "out")
    state.folder.mkdir()
    begun, now = ({"recipe": asdict(get_recipe(name)), "dtype": "torch.float32"} for name in ("mbq", "tlq"))
    state.begin(begun)
    with pytest.raises(ValueError, match=r"\.out\.work was begun with recipe\.") as refused:
        state.begin(now)
    assert "recipe.name 'mbq', now 'tlq'; recipe.tokens 'all', now 'set'; set it back to continue" in str(refused.value)
    state.begin(begun)
