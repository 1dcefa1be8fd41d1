"""Move the aliases in the MLflow registry: `candidate` is the newest version that passed the gate, `champion` the best.

A version is withheld if the run that registered it does not promote (`register.promote` is false): it takes no part
until a run that promotes registers the same checkpoint and scores.

MLflow has no compare-and-set. After moving the aliases, ``promote`` lists the versions again, and repeats if one was
registered in the meantime. The last writer has therefore compared all versions registered before, so two processes
that register at the same time, even on two machines, end with the better version as champion.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from tasks.registry.connection import first_line, retry_on_conflict
from tasks.registry.gate import CannotCompare, Contender, Difference, Outcome, Verdict, paired_difference, succession
from tasks.registry.runs import CHECKPOINT
from tasks.registry.versions import (
    GATE,
    OUTCOME,
    VARIANT,
    aliases,
    forget_outcome,
    identity,
    model_versions,
    set_outcome,
    set_verdict,
    verdict_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger("tlq.register")

CANDIDATE, CHAMPION = "candidate", "champion"
#: Artifact of a run that holds the score of every item; versions are compared by these scores.
ITEM_SCORES = "item_scores.parquet"

_UNDECIDED = (None, "not_compared")
#: Outcome of a version that takes no part in the choice of champion and candidate, and the reason.
WITHHELD = "withheld"
WHY_WITHHELD = (
    "register.promote is false, as in a flow run with `limit` or other values; to let the version compete, start that "
    "run again with `promote`"
)


def is_withheld(version: ModelVersion) -> bool:
    return version.tags.get(OUTCOME) == WITHHELD


def judge_again(client: MlflowClient, version: ModelVersion, verdict: Verdict) -> bool:
    """Replace the verdict of a registered version; returns whether the verdict differs from the old one.

    If the verdict changes between passed and failed, the version becomes a challenger again, unless it is withheld.
    """
    had = verdict_of(version)
    if had == verdict:
        return False
    set_verdict(client, version, verdict)
    if had.passed != verdict.passed and not is_withheld(version):
        forget_outcome(client, version)
    return True


def promote(client: MlflowClient, name: str) -> None:
    """Choose champion and candidate among the versions of model ``name``, and move the aliases."""
    retry_on_conflict(partial(_promote, client, name))


def _promote(client: MlflowClient, name: str) -> None:
    seen: set[int] = set()
    while True:
        found = _competing(client, name)
        appeared = found.keys() - seen if seen else set()
        # The alias is read after the list, so the champion is at least as new as any chosen from that list.
        _choose_champion(client, name, found, appeared)
        _choose_candidate(client, name, found)
        seen = set(found)
        if _competing(client, name).keys() <= seen:
            return


def _competing(client: MlflowClient, name: str) -> dict[int, ModelVersion]:
    """Versions of a model that are not withheld, by number."""
    return {int(each.version): each for each in model_versions(client, name) if not is_withheld(each)}


def _choose_champion(client: MlflowClient, name: str, found: Mapping[int, ModelVersion], appeared: set[int]) -> None:
    holder = aliases(client, name).get(CHAMPION)
    held = None if holder is None else found.get(holder) or client.get_model_version(name, str(holder))
    champion = None if held is None else _contender(client, held)
    undecided = {number for number, version in found.items() if version.tags.get(OUTCOME) in _UNDECIDED} | appeared
    contenders = {number: _contender(client, version) for number, version in found.items()}
    lapsed = _lapsed(champion, [contenders[number] for number in undecided])
    challengers = [
        each
        for number, each in contenders.items()
        if number != holder and (number in undecided or each.evaluation in lapsed)
    ]
    scores = _ItemScores(client, name)
    winner, outcomes = succession(champion, challengers, scores.difference)
    if winner is not None and winner.version != holder:
        client.set_registered_model_alias(name, CHAMPION, str(winner.version))
        logger.info("%s: version %d is champion: %s", name, winner.version, outcomes[winner.version].reason)
    if holder in undecided and not contenders[holder].passed:
        outcomes.setdefault(holder, Outcome("failed", "does not pass the gate; champion until another version does"))
    for number, outcome in outcomes.items():
        version = found.get(number) or client.get_model_version(name, str(number))  # an alias may be set by hand
        set_outcome(client, version, outcome.state, outcome.reason)
        if outcome.state == "not_compared":
            logger.warning("%s: version %d is not compared: %s", name, number, outcome.reason)
        elif outcome.state == "not_better":
            logger.info("%s: version %d is no better than the champion: %s", name, number, outcome.reason)


def _lapsed(champion: Contender | None, undecided: Iterable[Contender]) -> set[str]:
    """Evaluations in which the champion, or its checkpoint scored again, is newly found to fail.

    All challengers of these evaluations are compared again, because they lost to a champion that now fails the gate.
    """
    return {
        each.evaluation
        for each in undecided
        if champion is not None and each.checkpoint == champion.checkpoint and not each.passed
    }


def _choose_candidate(client: MlflowClient, name: str, found: Mapping[int, ModelVersion]) -> None:
    holder = aliases(client, name).get(CANDIDATE)
    newest = max((number for number, version in found.items() if version.tags.get(GATE) == "passed"), default=None)
    if newest is not None and newest != holder:
        client.set_registered_model_alias(name, CANDIDATE, str(newest))
    elif newest is None and holder is not None:
        client.delete_registered_model_alias(name, CANDIDATE)


def _contender(client: MlflowClient, version: ModelVersion) -> Contender:
    """A contender from the tags of a version and its run; a version that other software registered counts as failed."""
    result = identity(client, version)
    return Contender(
        int(version.version),
        version.tags.get(VARIANT, ""),
        result.get(CHECKPOINT, ""),
        result.get("evaluation", ""),
        version.tags.get(GATE) == "passed",
        json.loads(result.get("scores", "{}")).get("kl"),
    )


class _ItemScores:
    """Scores of every item by version, from the artifacts of the runs."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        self._client = client
        self._name = name

    def difference(self, challenger: Contender, champion: Contender) -> Difference:
        """Raises: CannotCompare."""
        return paired_difference(self._read(challenger.version), self._read(champion.version))

    def _read(self, number: int) -> pd.DataFrame:
        from mlflow.exceptions import MlflowException

        run_id = str(self._client.get_model_version(self._name, str(number)).run_id)
        try:
            with tempfile.TemporaryDirectory() as folder:
                return pd.read_parquet(Path(self._client.download_artifacts(run_id, ITEM_SCORES, folder)))
        except (MlflowException, OSError) as error:
            raise CannotCompare(
                f"the item scores of version {number} (artifact {ITEM_SCORES} of run {run_id}) cannot be read: "
                f"{first_line(error)}"
            ) from error
