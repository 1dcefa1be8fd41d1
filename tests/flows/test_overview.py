"""The progress of a whole run: the number of the stage, the time left, the durations of earlier runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import StateType, TaskRun
from support.waiting import Clock, eventually

from flows import overview, stages
from flows.overview import Overview, earlier_durations

STAGES = ("prepare", "calibrate@rtn-w3a16", "calibrate@tlq-w3a16", "report")
Shown = list[tuple[float, str]]


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What the artifact of a run shows: percent and text."""
    updates: Shown = []
    monkeypatch.setattr(overview.ProgressArtifact, "show", lambda self, percent, text: updates.append((percent, text)))
    return updates


def test_the_time_left_comes_from_earlier_runs() -> None:
    clock = Clock()
    earlier = {"prepare": 60, "calibrate@rtn-w3a16": 120, "calibrate@tlq-w3a16": 480, "report": 60}
    run = Overview(STAGES, 1, earlier, clock)
    assert run.begin("prepare") == "stage 1 of 4 prepare, about 12 min left"
    clock.now = 30
    assert run.time_left() == "about 12 min left"  # 11.5 min
    clock.now = 65
    assert run.end("prepare", "") == "stage 1 of 4 prepare: done in 1 min; about 11 min left"


def test_a_finished_stage_corrects_the_estimate_of_its_kind() -> None:
    clock = Clock()
    earlier = {"calibrate@rtn-w3a16": 100, "calibrate@tlq-w3a16": 600, "report": 0}
    run = Overview(STAGES[1:], 1, earlier, clock)
    run.begin("calibrate@rtn-w3a16")
    clock.now = 200
    assert run.end("calibrate@rtn-w3a16", "").endswith("done in 3 min; about 20 min left")


def test_without_an_earlier_run_stages_of_a_kind_are_alike() -> None:
    clock = Clock()
    run = Overview(STAGES[1:3], 1, {}, clock)
    assert run.begin("calibrate@rtn-w3a16") == "stage 1 of 2 calibrate@rtn-w3a16"
    assert run.time_left() == "time left not known yet (no finished calibrate to go by)"
    clock.now = 90
    assert run.end("calibrate@rtn-w3a16", "").endswith("; about 2 min left")


def test_the_baseline_says_how_long_evaluations_take_and_what_is_unknown_is_named() -> None:
    clock = Clock()
    run = Overview(["baseline", "evaluate@rtn-w3a16", "report", "register"], 1, {}, clock)
    assert run.begin("baseline") == "stage 1 of 4 baseline"
    assert run.text().endswith("time left not known yet (no finished evaluate or report or register to go by)")
    clock.now = 300
    assert run.end("baseline", "") == "stage 1 of 4 baseline: done in 5 min; more than 5 min left"
    assert run.text().endswith("; more than 5 min left (no finished report or register to go by)")
    assert Overview(["a", "b", "c", "d", "e"]).time_left().endswith("(no finished a or b or c or 2 more to go by)")


def test_concurrent_stages_share_the_time() -> None:
    variants = [f"evaluate@{number}" for number in range(4)]
    assert Overview(variants, 2, dict.fromkeys(variants, 600)).time_left() == "about 20 min left"
    assert Overview(variants, 4, {**dict.fromkeys(variants, 60), variants[0]: 600}).time_left() == "about 10 min left"
    assert Overview(["report"], 2, {"report": 7500}).time_left() == "about 2 h 5 min left"


def test_while_every_stage_was_skipped_the_estimate_is_an_upper_bound() -> None:
    clock = Clock()
    run = Overview(STAGES, 1, dict.fromkeys(STAGES, 60), clock)
    run.begin("prepare")
    assert run.end("prepare", "skipped", ran=False) == "stage 1 of 4 prepare: skipped; up to 3 min left"
    partly = Overview(STAGES, 1, dict.fromkeys(STAGES[:3], 60), clock)
    partly.begin("prepare")
    assert partly.end("prepare", "skipped", ran=False) == "stage 1 of 4 prepare: skipped"
    assert partly.text().endswith("; time left not known yet (no finished report to go by)")


def test_a_retried_stage_keeps_its_number() -> None:
    run = Overview(STAGES, 1, dict.fromkeys(STAGES, 60), Clock())
    for name in ("prepare", "report", "prepare"):
        line = run.begin(name)
    assert line.startswith("stage 1 of 4 prepare,")


def test_the_bar_of_the_run_goes_on_while_a_stage_is_at_work(shown: Shown) -> None:
    clock = Clock()
    run = Overview(STAGES, 1, dict.fromkeys(STAGES, 300), clock)
    run.begin("prepare")
    for clock.now in (5.0, 20.0, 180.0):
        run.beat()
    assert shown == [
        (0, "0 of 4 stages done; prepare is running for 0 s; about 20 min left"),
        (0, "0 of 4 stages done; prepare is running for 20 s; about 20 min left"),
        (0, "0 of 4 stages done; prepare is running for 3 min; about 17 min left"),
    ]
    run.end("prepare", "")
    assert shown[-1] == (25, "1 of 4 stages done; about 15 min left")


def task_runs(name: str) -> list[TaskRun]:
    with get_client(sync_client=True) as client:
        return client.read_task_runs(task_run_filter=TaskRunFilter(name=TaskRunFilterName(any_=[name])))


def test_only_stages_that_ran_count_as_earlier_durations(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"made": "Running stage 'made':", "old": "Stage 'old' didn't change, skipping"}

    def run_command(command: list[str], name: str, forward: Callable[[str], None]) -> None:
        forward(lines[name])

    monkeypatch.setattr(stages, "run_command", run_command)

    @flow
    def both() -> None:
        with stages.following(["made", "old"]):
            stages.run_stage("made")
            stages.run_stage("old")

    both()

    def recorded(name: str) -> list[tuple[str | None, StateType | None]]:
        return [(run.state_name, run.state_type) for run in task_runs(name)]

    eventually(lambda: recorded("old") == [("Skipped", StateType.COMPLETED)])
    eventually(lambda: recorded("made") == [("Completed", StateType.COMPLETED)])
    assert list(earlier_durations(["made", "old", "other"])) == ["made"]
