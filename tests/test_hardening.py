"""The page about bad inputs, attacks and kills holds the results of its command, and all of them are right."""

from __future__ import annotations

import pandas as pd
import pytest
from support.attacks import ATTACKS, ROOT, Attack
from support.hardening import PAGE, page, results
from support.outcomes import RIGHT


def test_the_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text() == page(), "run `make hardening PARTS=page`"


def test_no_result_is_wrong() -> None:
    inputs, attacks, kills = (pd.read_csv(results(part)) for part in ("inputs", "attacks", "kills"))
    assert set(inputs["outcome"]) <= set(RIGHT)
    assert not attacks["failed"].any()
    assert (kills["jobs"] == kills["same_bits"]).all()
    assert not kills[["lost", "leftovers", "orphans"]].to_numpy().any()
    assert kills["kills"].sum() >= 60


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.words)
def test_every_test_of_an_attack_exists(attack: Attack) -> None:
    for test in attack.tests:
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text()
