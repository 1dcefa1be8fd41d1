"""Tracking of a running calibration: layers, final status, continuation, an unreachable MLflow, concurrency."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from support.forked import Forked, run_together
from support.registry_results import layer_report

from tasks import command as cli
from tasks.registry.connection import connect
from tasks.registry.layers import fill_in_layers
from tasks.registry.runs import CHECKPOINT, new_run
from tasks.registry.tracking import LiveRun, recorded_failure, tracked_calibration
from tasks.stages import calibrate
from tlq.calibration.job import CalibrationJob
from tlq.parallel import Ranks
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.ranges import Ranges
from tlq.recipes import Recipe, get_recipe
from tlq.results import CalibrationReport
from tlq.runtime.digest import checkpoint_digest

OUT = Path("models/rtn-w3a16")


@pytest.fixture
def workspace(workspace: Path) -> Path:
    """A project folder that is ready for `calibrate`."""
    (workspace / "model").mkdir()
    (workspace / "model/config.json").write_text("{}")
    (workspace / "model/model.safetensors").write_bytes(b"weights")
    return workspace


def tracked(leads: bool = True, recipe: str = "rtn") -> Any:
    return track(get_recipe(recipe), ranks=Ranks(rank=0 if leads else 1, size=2))


def track(recipe: Recipe, scheme: str = "w3a16", out: Path = OUT, ranks: Ranks | None = None) -> Any:
    job = CalibrationJob(recipe, WeightQuantizer(get_scheme(scheme), torch.float32), ranks=ranks or Ranks())
    return tracked_calibration(out, Path("model"), job)


def finish(text: str = "{}") -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "calibration.json").write_text(text)


def runs() -> list[Run]:
    client = connect()
    return list(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def steps(run: Run, name: str = "layer/error_after") -> list[int]:
    return [metric.step for metric in connect().get_metric_history(run.info.run_id, name)]


def test_layers_are_logged_while_the_calibration_runs(workspace: Path) -> None:
    with tracked() as on_layer:
        on_layer(layer_report(0))
        (run,) = runs()
        assert (run.info.status, steps(run)) == ("RUNNING", [0])
        assert (run.data.tags["stage"], run.data.tags["variant"]) == ("calibrate", "rtn-w3a16")
        on_layer(layer_report(1))
        finish()
    (run,) = runs()
    assert (run.info.status, steps(run)) == ("FINISHED", [0, 1])
    assert run.data.tags[CHECKPOINT] == checkpoint_digest(OUT)
    assert run.data.params["recipe.name"] == "rtn"
    assert "hardware.cpu" in run.data.tags
    assert run.data.metrics["layer/error_before"] == 3.0


def test_another_rank_and_a_project_without_register_record_nothing(workspace: Path) -> None:
    with tracked(leads=False) as on_layer:
        assert on_layer is None
    params = yaml.safe_load(Path("params.yaml").read_text())
    del params["register"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with tracked() as on_layer:
        assert on_layer is None
    assert runs() == []


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("layer 3: the Hessian is not finite\nmore"), "FAILED", "layer 3: the Hessian is not finite"),
        (KeyboardInterrupt(), "KILLED", "interrupted; the same command continues"),
    ],
)
def test_an_interrupted_calibration_records_the_reason_and_is_continued(
    workspace: Path, error: BaseException, status: str, reason: str
) -> None:
    def break_off() -> None:
        with tracked() as on_layer:
            on_layer(layer_report(0))
            raise error

    with pytest.raises(type(error)):
        break_off()
    (broken,) = runs()
    assert (broken.info.status, broken.data.tags["error"]) == (status, reason)
    with tracked() as on_layer:
        on_layer(layer_report(1))
        finish()
    (run,) = runs()
    assert (run.info.run_id, run.info.status) == (broken.info.run_id, "FINISHED")
    assert "error" not in run.data.tags
    assert steps(run) == [0, 1]


def test_different_work_gets_its_own_run(workspace: Path) -> None:
    for _ in range(2):  # the second time the first has ended: it is done again, not continued
        with tracked():
            finish()
    with pytest.raises(ValueError, match="stop"), tracked():
        raise ValueError("stop")
    (workspace / "model/config.json").write_text('{"other": 1}')
    with tracked():
        finish()
    assert sorted(run.info.status for run in runs()) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]


def test_a_second_process_with_the_same_work_leaves_the_run_to_the_first(workspace: Path) -> None:
    with tracked() as on_layer:
        with pytest.raises(BlockingIOError), tracked():
            raise BlockingIOError("another process works here")
        (run,) = runs()
        assert run.info.status == "RUNNING"
        on_layer(layer_report(0))
        finish()
    assert [run.info.status for run in runs()] == ["FINISHED"]


def test_an_mlflow_that_does_not_answer_stops_the_stage_before_the_work(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 does not answer"), tracked():
        raise AssertionError("the work began")


class Flaky:
    """A client whose calls fail while it is down."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.down = False
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.down:
                raise MlflowException("connection refused")
            return getattr(self.client, name)(*arguments, **options)

        return call


@pytest.fixture
def live(workspace: Path) -> tuple[LiveRun, Flaky, list[float]]:
    """A run, its client, and the time of its clock."""
    client, now = connect(), [0.0]
    flaky = Flaky(client)
    run_id = new_run(client, "tlq", "rtn-w3a16", {})
    return LiveRun(flaky, run_id, clock=lambda: now[0]), flaky, now  # type: ignore[arg-type]


def test_layers_that_could_not_be_sent_follow_when_mlflow_is_back(
    live: tuple[LiveRun, Flaky, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    run, client, now = live
    client.down = True
    run.log_layer(layer_report(0))
    calls = client.calls
    run.log_layer(layer_report(1))
    assert client.calls == calls  # a server that is away does not cost every layer a timeout
    now[0] = 1000
    run.log_layer(layer_report(2))
    client.down = False
    now[0] = 2000
    run.log_layer(layer_report(3))
    assert steps(runs()[0]) == [0, 1, 2, 3]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "calibration goes on" in warnings[0].message
    assert "from calibration.json" in warnings[0].message


def test_an_unreachable_mlflow_does_not_fail_the_calibration(live: tuple[LiveRun, Flaky, list[float]]) -> None:
    run, client, _ = live
    client.down = True
    run.log_layer(layer_report(0))
    run.end("FINISHED", {CHECKPOINT: "d"})
    assert runs()[0].info.status == "RUNNING"


def test_a_failing_stage_is_recorded_and_its_error_is_raised(workspace: Path) -> None:
    with pytest.raises(ValueError, match="unusable"), recorded_failure("evaluate", "tlq-w3a16"):
        raise ValueError("demo_mmmu: 40 items are unusable")
    (run,) = runs()
    assert (run.info.status, run.data.tags["stage"], run.data.tags["variant"]) == ("FAILED", "evaluate", "tlq-w3a16")
    assert run.data.tags["error"] == "demo_mmmu: 40 items are unusable"


def test_a_failure_that_cannot_be_recorded_is_still_raised(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match="unusable"), recorded_failure("evaluate", "tlq-w3a16"):
        raise ValueError("unusable")
    assert "the failure of evaluate tlq-w3a16 is not recorded" in caplog.text


def test_the_stage_logs_its_layers_and_links_run_and_checkpoint(
    project: Path, tmp_path: Path, new_tracking: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    new_tracking(folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"register": {"model_name": "tiny"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    calibrate.main("tlq", "w3a16")
    (run,) = runs()
    assert (run.info.status, steps(run)) == ("FINISHED", [0, 1])
    assert run.data.tags[CHECKPOINT] == checkpoint_digest(Path("models/tlq-w3a16"))
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["calibration", "tokens"]
    report = CalibrationReport.load(Path("models/tlq-w3a16/calibration.json"))
    assert fill_in_layers(connect(), run.info.run_id, report) == 0


@pytest.mark.parametrize(("scheme", "names"), [("w2a16", ["calibration"]), ("w3a16", [])])
def test_a_run_names_the_data_that_its_scheme_needs(workspace: Path, scheme: str, names: list[str]) -> None:
    """A recipe that searches ranges at two bits reads no data at three, and its model card says so too."""
    recipe = replace(get_recipe("rtn"), ranges=Ranges("search", most_bits=2))
    (workspace / "data/prepared").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"question": ["Which?"]}), workspace / "data/prepared/calibration.parquet")
    with track(recipe, scheme):
        finish()
    (run,) = runs()
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == names


def _begin(folder: Path) -> None:
    def main() -> None:
        with tracked():
            (folder / "begun").touch()
            time.sleep(100)

    cli.run(main)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, "KILLED"), (signal.SIGKILL, "RUNNING")])
def test_a_killed_process_leaves_a_run_that_the_next_one_continues(
    workspace: Path, number: signal.Signals, status: str
) -> None:
    process = Forked(_begin, workspace)
    process.start()
    deadline = time.monotonic() + 60
    while not (workspace / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    (broken,) = runs()
    assert broken.info.status == status
    with tracked():
        finish()
    assert [each.info.status for each in runs()] == ["FINISHED"]


def _log_many(variant: str, layers: int) -> None:
    out = Path("models") / variant
    with track(get_recipe("rtn"), out=out) as on_layer:
        assert on_layer is not None
        for index in range(layers):
            on_layer(layer_report(index))
        out.mkdir(parents=True)
        (out / "calibration.json").write_text("{}")


def test_concurrent_calibrations_keep_all_metrics_in_sqlite(workspace: Path) -> None:
    (workspace / "mlflow.db").unlink()  # they also race for making the database
    variants, layers = [f"rtn-{number}" for number in range(3)], 30
    assert run_together(_log_many, *((variant, layers) for variant in variants)) == [0, 0, 0]
    found = {run.data.tags["variant"]: run for run in runs()}
    assert sorted(found) == variants
    for run in found.values():
        assert run.info.status == "FINISHED"
        assert steps(run) == list(range(layers))
        assert steps(run, "layer/error_before") == list(range(layers))
