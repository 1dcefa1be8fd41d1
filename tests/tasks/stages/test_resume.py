"""After any interruption of `importance` or `calibrate`, the same command continues to the same bits."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError
from support.forked import Forked
from support.forked_stages import attempt

from tasks.files import IMPORTANCE
from tasks.stages import calibrate, importance
from tlq import job
from tlq.export import shards as export
from tlq.importance import gradients as scoring
from tlq.runtime.resume import ResumeState

STAGES = ("importance", "calibrate")
RESULTS = {"importance": Path("data/importance"), "calibrate": Path("models/tlq-c-w3a16")}
WORK = {"importance": Path("data/.importance-answer.work"), "calibrate": Path("models/.tlq-c-w3a16.work")}

each_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture
def workplace(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project that a test may change; importance is computed in several passes."""
    shutil.copytree(project / "data", tmp_path / "data")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["importance"]["batch_size"] = 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage in this process."""
    {"importance": importance.score, "calibrate": lambda: calibrate.quantize("tlq-c", "w3a16")}[stage]()


def result(stage: str) -> dict[str, bytes]:
    """Files of a stage's result, except files with times; asserts that no other file is next to it."""
    assert not WORK[stage].exists()
    return {file.name: file.read_bytes() for file in RESULTS[stage].iterdir() if file.name != "calibration.json"}


@pytest.fixture
def expected(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, bytes]]:
    """The result of an uninterrupted stage; the result is removed afterwards."""

    def undisturbed(stage: str) -> dict[str, bytes]:
        run(stage, monkeypatch)
        made = result(stage)
        shutil.rmtree(RESULTS[stage])
        return made

    return undisturbed


def parts(stage: str) -> list[Path]:
    return sorted(WORK[stage].glob("part-*.safetensors"))


def failing_save(stage: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make writing the second part of the stage fail."""
    module: Any = {"importance": scoring, "calibrate": export}[stage]
    save, calls = module.save_file, iter(range(10**6))

    def once(*args: Any, **named: Any) -> None:
        if next(calls) == 1:
            raise error
        save(*args, **named)

    monkeypatch.setattr(module, "save_file", once)


@each_stage
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["interrupt", "full disk", "full disk, told by safetensors"],
)
def test_a_failed_write_keeps_the_finished_parts(
    expected: Callable[[str], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    made = expected(stage)
    with pytest.MonkeyPatch.context() as patch:
        failing_save(stage, patch, error)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
            run(stage, monkeypatch)
    assert len(parts(stage)) == 1
    assert not RESULTS[stage].exists()
    written = parts(stage)[0].stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        kept: list[int] = []
        module: Any = {"importance": scoring, "calibrate": job}[stage]
        name = {"importance": "write_importance", "calibrate": "finish_checkpoint"}[stage]
        owner: Any = importance if stage == "importance" else module
        finish = getattr(owner, name)

        def noting(*args: Any) -> Any:
            kept.append(parts(stage)[0].stat().st_mtime_ns)
            return finish(*args)

        patch.setattr(owner, name, noting)
        run(stage, monkeypatch)
    assert kept == [written]  # the first part was not made again
    assert result(stage) == made


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "half a file": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) and None,
    "an empty file": lambda file: file.write_bytes(b"") and None,
    "a report with a flipped bit": lambda file: flip(file.with_suffix(".json")),
    "an empty report": lambda file: file.with_suffix(".json").write_text("") and None,
    "a report of nothing": lambda file: file.with_suffix(".json").write_text("[]") and None,
    "no report": lambda file: file.with_suffix(".json").unlink(),
    "no tensors": Path.unlink,
}


@each_stage
def test_a_damaged_part_is_computed_again(
    expected: Callable[[str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stage: str,
) -> None:
    made = expected(stage)
    for name, damage in DAMAGE.items():
        with pytest.MonkeyPatch.context() as patch:
            failing_save(stage, patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run(stage, monkeypatch)
        damage(parts(stage)[0])
        caplog.clear()
        run(stage, monkeypatch)
        assert result(stage) == made, name
        shutil.rmtree(RESULTS[stage])
        warned = caplog.text.count("part-00000.safetensors is damaged; it is computed again")
        assert warned == (0 if name.startswith("no ") else 1), name


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Callable[[Path], Path]]:
    """Mount a file system of 64 MiB at a folder."""
    mounted = []

    def mount(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if shutil.which("mount") is None:
        pytest.skip("mount is not installed")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Write a file that takes all remaining space."""
    ballast = folder / "ballast"
    size = shutil.disk_usage(folder).free
    ballast.write_bytes(bytes(size))
    return ballast


def test_a_disk_that_fills_up_keeps_the_finished_layers(
    expected: Callable[[str], dict[str, bytes]],
    small_disk: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real disk: another file takes the space that the plan counted as free, after the first layer."""
    made = expected("calibrate")
    disk = small_disk(Path("models"))
    finish = ResumeState.finish

    def filling(self: ResumeState, index: int, report: dict[str, Any]) -> None:
        finish(self, index, report)
        fill(disk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumeState, "finish", filling)
        with pytest.raises(
            OSError, match="part-00001.safetensors: cannot be written .*free some space and run the same"
        ):
            run("calibrate", monkeypatch)
    assert len(parts("calibrate")) == 1
    with pytest.raises(OSError, match=r"calibration: about 0\.00 GiB are needed on the disk of .*, 0\.00 GiB are free"):
        run("calibrate", monkeypatch)  # still full: refused before any work
    (disk / "ballast").unlink()
    run("calibrate", monkeypatch)
    assert result("calibrate") == made


@pytest.mark.parametrize(
    ("stage", "number", "status"),
    [
        ("importance", signal.SIGTERM, 143),
        ("calibrate", signal.SIGINT, 130),
        ("importance", signal.SIGKILL, -9),
        ("calibrate", signal.SIGKILL, -9),
    ],
)
def test_a_signal_stops_the_command_and_the_same_command_continues(
    expected: Callable[[str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    number: int,
    status: int,
) -> None:
    made = expected(stage)
    process = Forked(attempt, stage, Path.cwd())
    process.start()
    deadline = time.monotonic() + 120
    while not parts(stage) and process.is_alive():
        assert time.monotonic() < deadline, "no part within 120 s"
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(120)
    errors = Path("log.txt").read_text()
    if process.exitcode:  # else it was quicker than the signal
        assert process.exitcode == status, errors
        assert "Traceback" not in errors
        assert status < 0 or "interrupted; run the same command again to continue" in errors
        assert not RESULTS[stage].exists()
        run(stage, monkeypatch)
    assert result(stage) == made


@each_stage
def test_a_second_process_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    place = IMPORTANCE.with_name("importance-answer") if stage == "importance" else RESULTS[stage]
    with (
        ResumeState(place).locked(),
        pytest.raises(BlockingIOError, match="another process works here; wait for it, or stop it"),
    ):
        run(stage, monkeypatch)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"dtype": "bfloat16"}, "dtype 'torch.float32', now 'torch.bfloat16'"),
        ("importance", {"batch_size": 2}, "data '[0-9a-f]{64}', now '[0-9a-f]{64}'"),
    ],
)
def test_resuming_scores_with_other_parameters_names_the_difference(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, section: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        failing_save("importance", patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run("importance", monkeypatch)
    params = yaml.safe_load(Path("params.yaml").read_text())
    params[section] = {**params[section], **changes}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ValueError, match=f"importance-answer.work was begun with {message}; set it back to continue"):
        run("importance", monkeypatch)


def test_scores_of_another_model_are_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same samples, same shapes, other weights."""
    with pytest.MonkeyPatch.context() as patch:
        failing_save("importance", patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run("importance", monkeypatch)
    params = yaml.safe_load(Path("params.yaml").read_text())
    other = shutil.copytree(params["model"]["path"], workplace / "other")
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    params["model"]["path"] = str(other)
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ValueError, match=r"was begun with model '[0-9a-f]{64}', now"):
        run("importance", monkeypatch)


@each_stage
def test_hidden_states_on_disk_change_no_bit(
    expected: Callable[[str], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    made = expected(stage)
    monkeypatch.setenv("TLQ_HOST_MEMORY", "0")
    run(stage, monkeypatch)
    assert result(stage) == made
