"""Aliases when several processes register at once: no version is lost, and the best one is champion."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from support.forked import FORK, run_together
from support.registry_results import answers, write_variant

from tasks.config.params import section
from tasks.config.sections import EvaluateParams, ModelParams, RegisterParams
from tasks.registry.connection import connect
from tasks.registry.gate import Verdict
from tasks.registry.promotion import ITEM_SCORES, promote
from tasks.registry.runs import CHECKPOINT, new_run, set_tags
from tasks.registry.versions import aliases, described, model_versions, verdict_tag
from tasks.stages.register import Registrar, register_all

NAME = "tiny-w3a16"


def add_version(client: MlflowClient, right: int, kl: float = 0.1) -> int:
    """Create a version that passed the gate directly in the registry, without moving aliases."""
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    run_id = new_run(client, "tlq", "made", {})
    set_tags(client, run_id, {"evaluation": "e", CHECKPOINT: run_id, "scores": json.dumps({"kl": kl})})
    answers(right, kl)[["task", "doc", "score"]].to_parquet(ITEM_SCORES)
    client.log_artifact(run_id, ITEM_SCORES)
    tags = {"variant": run_id} | verdict_tag(Verdict())
    text = described("scores", Verdict())
    return int(client.create_model_version(NAME, "file:///nowhere", run_id=run_id, tags=tags, description=text).version)


class Interrupted:
    """A client that calls a function once, just before its first call of ``method``."""

    def __init__(self, client: MlflowClient, method: str, happens: Callable[[], None]) -> None:
        self._client = client
        self._method = method
        self._happens: list[Callable[[], None]] = [happens]

    def __getattr__(self, name: str) -> object:
        if name == self._method and self._happens:
            self._happens.pop()()
        return getattr(self._client, name)


@pytest.mark.parametrize("moment", ["get_registered_model", "set_registered_model_alias", "set_model_version_tag"])
@pytest.mark.parametrize(("first", "second"), [(40, 49), (49, 40)])
def test_the_last_writer_has_compared_both_versions(workspace: Path, moment: str, first: int, second: int) -> None:
    """Another process registers a version and moves the aliases in the middle of ours."""
    client = connect()
    add_version(client, first)

    def other_process() -> None:
        add_version(client, second)
        promote(client, NAME)

    promote(Interrupted(client, moment, other_process), NAME)  # type: ignore[arg-type]
    assert aliases(client, NAME) == {"champion": 1 if first > second else 2, "candidate": 2}


def test_missing_item_scores_keep_the_champion_and_are_logged(workspace: Path) -> None:
    client = connect()
    add_version(client, 40)
    promote(client, NAME)
    run_id = str(client.get_model_version(NAME, "1").run_id)
    shutil.rmtree(Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")))
    add_version(client, 49)
    promote(client, NAME)
    assert aliases(client, NAME)["champion"] == 1
    assert "item scores of version 1" in client.get_model_version(NAME, "2").description


def test_a_version_registered_by_other_software_is_ignored(workspace: Path) -> None:
    client = connect()
    add_version(client, 40)
    client.create_model_version(NAME, "file:///nowhere")
    promote(client, NAME)
    assert aliases(client, NAME) == {"champion": 1, "candidate": 1}


def _register(folder: Path, variant: str, barrier: multiprocessing.synchronize.Barrier) -> None:
    os.chdir(folder)
    registrar = Registrar(
        connect(),
        section("register", RegisterParams),
        section("evaluate", EvaluateParams),
        section("model", ModelParams),
    )
    barrier.wait(60)
    register_all(registrar, [variant])


def test_concurrent_registrations_keep_every_version(workspace: Path) -> None:
    (workspace / "mlflow.db").unlink()  # they also race for making the database
    skill = {"rtn-w3a16": 42, "mbq-w3a16": 45, "tlq-w3a16": 50}
    for variant, right in skill.items():
        write_variant(workspace, variant, right)
    barrier = FORK.Barrier(len(skill))
    assert run_together(_register, *((workspace, variant, barrier) for variant in skill)) == [0, 0, 0]
    client = connect()
    found = {version.tags["variant"]: version for version in model_versions(client, NAME)}
    assert found.keys() == skill.keys()
    assert sorted(int(version.version) for version in found.values()) == [1, 2, 3]
    assert aliases(client, NAME) == {"champion": int(found["tlq-w3a16"].version), "candidate": 3}
    for version in found.values():
        run = client.get_run(str(version.run_id))
        assert run.info.status == "FINISHED"
        assert run.data.metrics["mean/score"] == pytest.approx(2 * skill[version.tags["variant"]])
        assert len(client.get_metric_history(run.info.run_id, "layer/error_after")) == 2
        scores = Path(client.download_artifacts(run.info.run_id, ITEM_SCORES, str(workspace)))
        assert len(pd.read_parquet(scores)) == 100
    assert aliases(client, NAME)["candidate"] == 3


def test_two_registrations_of_one_result_make_one_version(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", 50)
    barrier = FORK.Barrier(2)
    assert run_together(_register, *[(workspace, "tlq-w3a16", barrier)] * 2) == [0, 0]
    client = connect()
    assert [version.tags["variant"] for version in model_versions(client, NAME)] == ["tlq-w3a16"]
    (experiment,) = [each for each in client.search_experiments() if each.name == "tlq"]
    assert len(client.search_runs([experiment.experiment_id], "tags.variant = 'full'")) == 1
