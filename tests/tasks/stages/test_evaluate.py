"""Stage `evaluate` from end to end on a tiny model: files, comparison, resuming, errors."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.benchmark_rows import mmmu_rows, textvqa_rows, write_rows
from support.disks import full_disk
from support.tiny import png

from benchmarks.data import BenchmarkError, BenchmarkSource
from benchmarks.harness import load_benchmarks
from benchmarks.journal import Journal
from benchmarks.model import VisionLM
from benchmarks.results import EvaluationRun
from tasks.config.params import ParamsError
from tasks.config.sections import EvaluateParams
from tasks.stages import evaluate
from tlq.export.loading import load_model
from tlq.runtime.files import link_or_copy, new_directory
from tlq.runtime.memory import peak_resident


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> EvaluateParams:
    folder = tmp_path_factory.mktemp("rows")
    sources = (
        BenchmarkSource("demo_textvqa", data=write_rows(folder / "textvqa.parquet", textvqa_rows(12))),
        BenchmarkSource("demo_mmmu", data=write_rows(folder / "mmmu.parquet", mmmu_rows(12))),
    )
    return EvaluateParams(benchmarks=sources, limit=8, batch_size=4, max_new_tokens=4, resamples=100)


@pytest.fixture(scope="module")
def variant_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on a layer, as a coarse quantizer would leave it."""
    folder = tmp_path_factory.mktemp("variant")
    shutil.copytree(tiny_checkpoint, folder, dirs_exist_ok=True)
    model = load_model(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    weight = model.model.language_model.layers[0].mlp.down_proj.weight.data
    weight += 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(
    params: EvaluateParams,
    tiny_checkpoint: Path,
    variant_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate.evaluate_variant("full", str(tiny_checkpoint), params, folder)
    evaluate.evaluate_variant("rtn-w3a16", str(variant_checkpoint), params, folder)
    return folder


def counted_answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of items of every batch that is asked from now on."""
    answered: list[int] = []
    original = VisionLM._run
    monkeypatch.setattr(VisionLM, "_run", lambda *a: (answered.append(len(a[1])), original(*a))[1])
    return answered


def metrics_of(results: Path, variant: str) -> dict[str, Any]:
    return json.loads((results / variant / "metrics.json").read_text())


def test_every_file_of_a_variant_is_written(results: Path) -> None:
    files = {"metrics.json", "run.json", "summary.json", "items.parquet", "scores.csv", "skipped.csv"}
    assert {path.name for path in (results / "full").iterdir()} == files | {"reference"}
    assert {path.name for path in (results / "rtn-w3a16").iterdir()} == files
    assert sorted(path.name for path in results.iterdir()) == [".working", "full", "rtn-w3a16"]
    assert not list((results / ".working").iterdir())
    scores = pd.read_csv(results / "rtn-w3a16" / "scores.csv")
    assert list(scores.columns) == ["variant", "benchmark", "score", "low", "high"]
    assert list(scores["benchmark"]) == ["mean", "demo_textvqa", "demo_mmmu"]


def test_items(results: Path) -> None:
    full = pd.read_parquet(results / "full" / "items.parquet")
    variant = pd.read_parquet(results / "rtn-w3a16" / "items.parquet")
    assert len(full) == 16
    assert full[["task", "doc", "prompt", "target"]].equals(variant[["task", "doc", "prompt", "target"]])
    assert (full["kl"] == 0).all()
    assert (variant["kl"] > 0).all()
    assert (variant["n_answer_tokens"] >= 2).all()


def test_metrics(results: Path) -> None:
    full, variant = metrics_of(results, "full"), metrics_of(results, "rtn-w3a16")
    assert full["variant"] == "full"
    assert "retention" not in full["mean"]
    assert full["mean"]["kl"] == 0
    assert variant["mean"]["n"] == variant["mean"]["asked"] == variant["mean"]["pairs"] == 16
    assert variant["mean"]["kl"] > 0
    assert variant["benchmarks"]["demo_mmmu"]["parts"]["unparsed"]["n"] > 0
    assert variant["benchmarks"]["demo_textvqa"]["skipped"] == 0
    assert variant["benchmarks"]["demo_textvqa"]["empty_replies"] >= 0
    summary = json.loads((results / "rtn-w3a16" / "summary.json").read_text())
    assert {"score", "demo_textvqa", "demo_mmmu", "kl", "nll", "n", "skipped"} <= set(summary)


def test_the_same_run_gives_the_same_bytes(
    results: Path, params: EvaluateParams, variant_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(results / "full", tmp_path / "full")
    evaluate.evaluate_variant("rtn-w3a16", str(variant_checkpoint), params, tmp_path)
    for name in ("metrics.json", "summary.json", "scores.csv"):
        assert (tmp_path / "rtn-w3a16" / name).read_bytes() == (results / "rtn-w3a16" / name).read_bytes()


def test_the_run_is_recorded_with_date_device_speed_and_memory(
    params: EvaluateParams, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    plain = EvaluateParams(benchmarks=params.benchmarks, limit=2, divergence=False, max_new_tokens=2, resamples=10)
    before = datetime.now(UTC).replace(microsecond=0)
    started = time.perf_counter()
    evaluate.evaluate_variant("full", str(tiny_checkpoint), plain, tmp_path)
    elapsed = time.perf_counter() - started
    run = EvaluationRun.load(tmp_path / "full" / "run.json")
    assert before <= datetime.fromisoformat(run.finished) <= datetime.now(UTC)
    assert (run.items, run.backend, run.device) == (4, "hf", evaluate.device().type.upper())
    assert 0 < run.seconds < elapsed
    assert run.items_per_second == 4 / run.seconds
    assert run.peak_memory_bytes is not None
    assert 1e8 < run.peak_memory_bytes <= peak_resident()


def test_a_model_read_layer_by_layer_has_the_same_nll_and_kl(
    results: Path, params: EvaluateParams, tiny_checkpoint: Path, variant_checkpoint: Path, tmp_path: Path
) -> None:
    streamed = params.model_copy(update={"backend": "streamed"})
    evaluate.evaluate_variant("full", str(tiny_checkpoint), streamed, tmp_path)
    evaluate.evaluate_variant("rtn-w3a16", str(variant_checkpoint), streamed, tmp_path)
    found, expected = (pd.read_parquet(folder / "rtn-w3a16/items.parquet") for folder in (tmp_path, results))
    for measure in ("nll", "kl"):
        np.testing.assert_allclose(found[measure], expected[measure], rtol=0, atol=1e-4)
    assert EvaluationRun.load(tmp_path / "rtn-w3a16/run.json").backend == "streamed"
    assert metrics_of(tmp_path, "rtn-w3a16")["mean"]["retention"] is not None


@pytest.mark.parametrize("variant", ["full", "rtn-w3a16"])
def test_a_killed_run_leaves_no_output_and_goes_on(
    variant: str,
    results: Path,
    params: EvaluateParams,
    tiny_checkpoint: Path,
    variant_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = str(tiny_checkpoint if variant == "full" else variant_checkpoint)
    if variant != "full":
        shutil.copytree(results / "full", tmp_path / "full")
    answered: list[int] = []
    original = VisionLM._run

    def counted(self: VisionLM, batch: Sequence[Any], *inputs: Any) -> Any:
        if sum(answered) == 8:
            raise KeyboardInterrupt
        answered.append(len(batch))
        return original(self, batch, *inputs)

    monkeypatch.setattr(VisionLM, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_variant(variant, checkpoint, params, tmp_path)
    assert not (tmp_path / variant).exists()
    answered[:] = [0]
    monkeypatch.setattr(VisionLM, "_run", lambda *a: (answered.append(len(a[1])), original(*a))[1])
    evaluate.evaluate_variant(variant, checkpoint, params, tmp_path)
    assert sum(answered) == 8
    assert metrics_of(tmp_path, variant) == metrics_of(results, variant)
    assert EvaluationRun.load(tmp_path / variant / "run.json").items == 8
    assert not list(tmp_path.glob(".working/*"))


def test_changed_params_do_not_reuse_answers(
    results: Path, params: EvaluateParams, variant_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(results / "full", tmp_path / "full")
    other = EvaluateParams(benchmarks=params.benchmarks, limit=8, batch_size=4, max_new_tokens=1, resamples=100)
    working = tmp_path / ".working" / "rtn-w3a16"
    working.mkdir(parents=True)
    (working / "fingerprint").write_text("of other params")
    (working / "answers.jsonl").write_text("{}\n")
    metrics = evaluate.evaluate_variant("rtn-w3a16", str(variant_checkpoint), other, tmp_path)
    assert metrics.mean.n == 16


def test_without_divergence(params: EvaluateParams, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = EvaluateParams(benchmarks=params.benchmarks, limit=2, divergence=False, max_new_tokens=2, resamples=10)
    metrics = evaluate.evaluate_variant("full", str(tiny_checkpoint), plain, tmp_path)
    assert metrics.mean.kl is None
    assert not (tmp_path / "full" / "reference").exists()


def test_too_many_unusable_items(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = textvqa_rows(5)
    rows[0]["answers"] = []
    source = BenchmarkSource("demo_textvqa", data=write_rows(tmp_path / "rows.parquet", rows))
    with pytest.raises(BenchmarkError, match=r"1 items \(20%\) are unusable, more than evaluate.max_skipped = 5%"):
        evaluate.evaluate_variant(
            "full", str(tiny_checkpoint), EvaluateParams(benchmarks=(source,), max_new_tokens=1), tmp_path
        )
    assert not (tmp_path / "full").exists()
    allowed = EvaluateParams(benchmarks=(source,), max_new_tokens=1, max_skipped=0.5, resamples=10)
    metrics = evaluate.evaluate_variant("full", str(tiny_checkpoint), allowed, tmp_path)
    assert (metrics.mean.n, metrics.mean.asked) == (4, 5)
    assert "no answer" in (tmp_path / "full" / "skipped.csv").read_text()


PARAMS = """
model: {path: MODEL}
evaluate:
  benchmarks: [{task: demo_textvqa, data: ROWS}]
  limit: 2
  max_new_tokens: 2
  resamples: 10
"""


def test_command_line(
    params: EvaluateParams,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PARAMS.replace("MODEL", str(tiny_checkpoint)).replace("ROWS", str(params.benchmarks[0].data))
    Path("params.yaml").write_text(text)
    with pytest.raises(FileNotFoundError, match="models/rtn-w3a16: not found; run `dvc repro calibrate@rtn-w3a16`"):
        evaluate.main("rtn-w3a16")
    evaluate.main("full")
    assert Path("evaluation/full/metrics.json").is_file()
    Path("params.yaml").write_text(text.replace("limit: 2", "limits: 2"))
    with pytest.raises(ParamsError, match="evaluate.limits: unknown key"):
        evaluate.main("full")


def test_a_variant_needs_full_precision_first(params: EvaluateParams, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="full/items.parquet: not found; run `dvc repro baseline` first"):
        evaluate.evaluate_variant("rtn-w3a16", str(tiny_checkpoint), params, tmp_path)


def test_an_evaluation_keeps_files_of_the_users_own(
    params: EvaluateParams, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    plain = EvaluateParams(benchmarks=params.benchmarks, limit=2, divergence=False, max_new_tokens=2, resamples=10)
    own = tmp_path / "full" / "mine" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (tmp_path / "full" / "link").symlink_to("nothing")
    (tmp_path / "full" / "reference").mkdir()
    (tmp_path / "full" / "scores.csv").write_text("old")
    evaluate.evaluate_variant("full", str(tiny_checkpoint), plain, tmp_path)
    assert own.read_text() == "mine"
    assert (tmp_path / "full" / "link").is_symlink()
    assert {path.name for path in (tmp_path / "full").iterdir()} == {*evaluate.RESULTS, "mine", "link"} - {"reference"}
    assert (tmp_path / "full" / "scores.csv").read_text() != "old"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_while_results_are_replaced_loses_neither(
    rename: int, params: EvaluateParams, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a system that cannot exchange folders. A further run puts the old or the new results in place."""
    monkeypatch.setattr("tlq.runtime.files._exchange", lambda *_: False)
    plain = EvaluateParams(benchmarks=params.benchmarks, limit=2, divergence=False, max_new_tokens=2, resamples=10)
    evaluate.evaluate_variant("full", str(tiny_checkpoint), plain, tmp_path)
    files = {path.name for path in (tmp_path / "full").iterdir()}
    renames = 0
    original = Path.replace

    def killed(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += self.is_dir()
        if self.is_dir() and renames == rename:
            raise SystemExit("killed")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a killed process tidies up nothing
        with pytest.raises(SystemExit):
            evaluate.evaluate_variant("full", str(tiny_checkpoint), plain, tmp_path)
    kept = [folder for folder in tmp_path.iterdir() if {path.name for path in folder.iterdir()} == files]
    assert {folder.name for folder in kept} == ({"full", ".full.tmp"} if rename == 1 else {".full.old", ".full.tmp"})
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "full"):
        raise KeyboardInterrupt
    assert {path.name for path in (tmp_path / "full").iterdir()} == files


@pytest.mark.parametrize("moment", ["first part", "last part", "exchange", "end"])
def test_a_kill_while_results_are_written_keeps_the_old_ones_and_the_answers(
    moment: str,
    results: Path,
    params: EvaluateParams,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(results / "full", tmp_path / "full")
    scores = tmp_path / "full" / "scores.csv"
    scores.unlink()
    scores.write_text("old")
    parts = len(list((results / "full" / "reference").iterdir()))
    assert parts > 1
    links = 0

    def linking(path: Path, target: Path) -> None:
        nonlocal links
        links += 1
        if links == {"first part": 1, "last part": parts}.get(moment):
            raise SystemExit("killed")
        link_or_copy(path, target)

    def killed(*_: Any, **__: Any) -> Any:
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "link_or_copy", linking)
        if moment == "exchange":
            patch.setattr("tlq.runtime.files._exchange", killed)
        patch.setattr(shutil, "rmtree", lambda path, **_: killed() if path == tmp_path / ".working/full" else None)
        with pytest.raises(SystemExit):
            evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert (scores.read_text() == "old") == (moment != "end")
    assert len(list((tmp_path / "full" / "reference").iterdir())) == parts
    answered = counted_answers(monkeypatch)
    evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert not answered
    assert {path.name for path in (tmp_path / "full").iterdir()} == {path.name for path in (results / "full").iterdir()}
    assert metrics_of(tmp_path, "full") == metrics_of(results, "full")
    assert not list(tmp_path.glob(".working/*"))


@pytest.mark.parametrize("place", ["benchmarks.divergence.save_file", "pandas.DataFrame.to_parquet"])
def test_a_full_disk_is_told_in_one_line_and_the_same_command_continues(
    place: str,
    results: Path,
    params: EvaluateParams,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, full_disk)
        with pytest.raises(OSError, match=rf"^{tmp_path}/.*: cannot be written .* run the same command again$"):
            evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert not (tmp_path / "full").exists()
    evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert metrics_of(tmp_path, "full") == metrics_of(results, "full")


def flip_last_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda part: part.unlink(), 4),
        (lambda part: part.write_bytes(part.read_bytes()[:-9]), 4),
        (flip_last_bit, 1),
    ],
)
def test_answers_without_their_reference_are_asked_again(
    damage: Callable[[Path], object],
    again: int,
    results: Path,
    params: EvaluateParams,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_check_skipped", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    reference = tmp_path / ".working/full/reference"
    damage(reference / "part-00001.safetensors")
    answered = counted_answers(monkeypatch)
    evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert sum(answered) == again
    assert metrics_of(tmp_path, "full") == metrics_of(results, "full")
    if again == 4:  # the whole batch, which gets the file that it had
        assert reference_of(tmp_path) == reference_of(results)


def reference_of(results: Path) -> dict[str, bytes]:
    return {part.name: part.read_bytes() for part in (results / "full/reference").iterdir()}


def test_a_kill_before_answers_are_finished_leaves_no_second_reference(
    results: Path, params: EvaluateParams, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    add, batches = Journal.add, iter(range(9))

    def killed(self: Journal, items: Sequence[Any]) -> None:
        if next(batches) == 1:
            raise SystemExit("killed")
        add(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        with pytest.raises(SystemExit):
            evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert len(list(tmp_path.glob(".working/full/reference/*"))) == 2
    evaluate.evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert reference_of(tmp_path) == reference_of(results)


def test_other_pixels_under_the_same_name_are_answered_again(params: EvaluateParams, tmp_path: Path) -> None:
    rows = textvqa_rows(4)
    digests = []
    for colour in (1, 1, 2):
        rows[2]["image"] = {"bytes": png(colour), "path": None}
        source = BenchmarkSource("demo_textvqa", data=write_rows(tmp_path / f"{len(digests)}.parquet", rows))
        digests.append(load_benchmarks([source], None, 0)["demo_textvqa"].rows.digest())
    assert digests[0] == digests[1] != digests[2]


def test_local_benchmark_files_must_be_in_the_folder_that_dvc_tracks() -> None:
    inside = BenchmarkSource("demo_textvqa", data="data/demo/world/textvqa.parquet")
    outside = BenchmarkSource("demo_chartqa", data="elsewhere/chartqa.parquet")
    on_hub = BenchmarkSource("mmmu_vlm")
    assert EvaluateParams(benchmarks=(inside, on_hub), data="data/demo/world").benchmarks == (inside, on_hub)
    with pytest.raises(ValueError, match=r"demo_chartqa: elsewhere/.* is outside evaluate\.data = data/demo/world"):
        EvaluateParams(benchmarks=(inside, outside), data="data/demo/world")
