"""`python -m tasks.reproduce`: DVC runs stale stages, and files of the user's own in their folders are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A DVC repository in which the stage `make` has written out/a.txt and out/deep/b.txt, and `other` other/c.txt."""
    make = {"cmd": "mkdir -p out/deep && cp in.txt out/a.txt && cp in.txt out/deep/b.txt", "outs": ["out"]}
    other = {"cmd": "mkdir other && cp in.txt other/c.txt", "outs": ["other"]}
    stages = {name: {**stage, "deps": ["in.txt"]} for name, stage in {"make": make, "other": other}.items()}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "in.txt").write_text("1")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    assert reproduce(tmp_path)[0] == 0
    return tmp_path


def reproduce(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    command = [sys.executable, "-m", "tasks.reproduce", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_users_file_is_kept_when_its_folders_stage_runs(repository: Path) -> None:
    (repository / "out/notes.txt").write_text("mine")
    (repository / "out/deep/notes.txt").write_text("mine too")
    (repository / "in.txt").write_text("2")
    status, output = reproduce(repository, "--single-item", "make")
    assert status == 0
    assert files(repository / "out") == {"a.txt": "2", "deep/b.txt": "2"}
    assert files(repository / "kept") == {"out/notes.txt": "mine", "out/deep/notes.txt": "mine too"}
    (line,) = [line for line in output.splitlines() if line.startswith("WARNING")]
    assert line == (
        "WARNING tlq: out: deep/notes.txt, notes.txt (written by no stage) moved to kept/out, "
        "because DVC empties the folder before its stage runs"
    )


def test_a_users_file_does_not_make_its_folders_stage_run(repository: Path) -> None:
    (repository / "out/notes.txt").write_text("mine")
    status, output = reproduce(repository, "--single-item", "make")
    assert status == 0
    assert "Stage 'make' didn't change, skipping" in output
    assert files(repository / "kept") == {"out/notes.txt": "mine"}


def test_a_kept_file_is_not_replaced_by_another_of_its_name(repository: Path) -> None:
    for text in ("first", "second", "third"):
        (repository / "out/notes.txt").write_text(text)
        assert reproduce(repository, "--single-item", "make")[0] == 0
    kept = files(repository / "kept/out")
    assert kept == {"notes.txt": "first", "notes.txt.1": "second", "notes.txt.2": "third"}


def test_only_folders_of_the_stages_that_may_run_are_changed(repository: Path) -> None:
    (repository / "other/notes.txt").write_text("mine")
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert reproduce(repository, "make")[0] == 0
    assert reproduce(repository, "--dry")[0] == 0
    assert (repository / "other/notes.txt").exists()
    assert reproduce(repository)[0] == 0
    assert files(repository / "kept") == {"other/notes.txt": "mine"}


def test_a_folder_that_no_stage_has_written_is_kept(repository: Path) -> None:
    """A checkpoint that was put by hand where a stage downloads one to, for instance."""
    (repository / "dvc.lock").unlink()
    shutil.rmtree(repository / ".dvc/cache")
    (repository / "in.txt").write_text("2")
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert files(repository / "kept") == {"out/a.txt": "1", "out/deep/b.txt": "1"}


def test_a_result_without_a_list_in_dvcs_cache_stays(repository: Path) -> None:
    shutil.rmtree(repository / ".dvc/cache")
    status, output = reproduce(repository, "--single-item", "make")
    assert status == 0, output
    assert files(repository / "out") == {"a.txt": "1", "deep/b.txt": "1"}
    assert not (repository / "kept").exists()


def test_results_of_another_commit_are_not_kept_twice(repository: Path) -> None:
    """After a checkout, dvc.lock may list other files than the folder has; DVC has them in its cache."""
    lock = (repository / "dvc.lock").read_text()
    pipeline = yaml.safe_load((repository / "dvc.yaml").read_text())
    pipeline["stages"]["make"]["cmd"] = "mkdir out && echo more > out/more.txt"
    (repository / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    assert reproduce(repository, "--single-item", "make")[0] == 0
    (repository / "dvc.lock").write_text(lock)
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert files(repository / "out") == {"more.txt": "more\n"}
    assert not (repository / "kept").exists()


@contextmanager
def running(repository: Path, stage: str, command: str, **entries: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A stage whose command writes the file `started` and waits for the file `go`, while it runs."""
    pipeline = yaml.safe_load((repository / "dvc.yaml").read_text())
    pipeline["stages"][stage] = {"cmd": f"{command}; touch started; until [ -e go ]; do sleep 0.1; done", **entries}
    (repository / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    words = [sys.executable, "-m", "tasks.reproduce", "--single-item", stage]
    process = subprocess.Popen(words, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (repository / "started").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the stage does not start"
            time.sleep(0.05)
        yield process
    finally:
        (repository / "go").touch()
        process.communicate(timeout=60)


@pytest.mark.parametrize("arguments", [("--single-item", "make"), ("make",), ()])
def test_the_output_of_a_stage_that_runs_stays(repository: Path, arguments: tuple[str, ...]) -> None:
    (repository / "dvc.lock").unlink()
    with running(repository, "make", "mkdir out; echo new > out/new.txt", outs=["out"]) as first:
        status, output = reproduce(repository, *arguments)
        assert status == 255
        assert "out' is busy" in output
    assert first.returncode == 0
    assert files(repository / "out") == {"new.txt": "new\n"}
    assert not (repository / "kept").exists()


def test_a_folder_that_another_stage_reads_stays(repository: Path) -> None:
    (repository / "in.txt").write_text("2")
    with running(repository, "read", "true", deps=["out"]):
        (repository / "out/notes.txt").write_text("mine")
        status, output = reproduce(repository, "--single-item", "make")
        assert status == 255
        assert "out' is busy" in output
        assert (repository / "out/notes.txt").read_text() == "mine"
    assert not (repository / "kept").exists()
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert files(repository / "kept") == {"out/notes.txt": "mine"}


def test_a_copy_of_a_result_and_an_empty_file_are_the_users(repository: Path) -> None:
    """Their content is in DVC's cache, but under other paths."""
    (repository / "other/empty.txt").touch()
    subprocess.run([sys.executable, "-m", "dvc", "commit", "--force", "--quiet"], cwd=repository, check=True)
    shutil.copy(repository / "out/a.txt", repository / "out/a-before.txt")
    (repository / "out/todo.txt").touch()
    (repository / "in.txt").write_text("2")
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert files(repository / "kept") == {"out/a-before.txt": "1", "out/todo.txt": ""}


def test_links_are_kept_and_lead_to_the_same_place(repository: Path) -> None:
    (repository / "mine").mkdir()
    (repository / "mine/notes.txt").write_text("mine")
    (repository / "out/relative").symlink_to("../mine")
    (repository / "out/deep/absolute").symlink_to(repository / "mine")
    (repository / "out/notes.txt").symlink_to("../mine/notes.txt")
    (repository / "in.txt").write_text("2")
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert files(repository / "out") == {"a.txt": "2", "deep/b.txt": "2"}
    kept = repository / "kept/out"
    assert sorted(os.listdir(kept)) == ["deep", "notes.txt", "relative"]
    for link in (kept / "relative/notes.txt", kept / "deep/absolute/notes.txt", kept / "notes.txt"):
        assert link.read_text() == "mine"


def test_a_file_that_cannot_be_moved_stops_before_anything_is_deleted(repository: Path) -> None:
    (repository / "out/notes.txt").write_text("mine")
    (repository / "in.txt").write_text("2")
    (repository / "kept").write_text("a file in the folder's place")
    status, output = reproduce(repository, "--single-item", "make")
    assert status == 1
    assert files(repository / "out") == {"a.txt": "1", "deep/b.txt": "1", "notes.txt": "mine"}
    assert output.splitlines()[-1].startswith("ERROR tlq: ")
    assert "kept" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_errors_of_dvc_keep_their_status(repository: Path) -> None:
    status, output = reproduce(repository, "--single-item", "nonsense")
    assert status == 255
    assert output.count("'nonsense' not found") == 1
    status, output = reproduce(repository, "--nonsense")
    assert status == 254
    assert output.count("unrecognized arguments") == 1


def test_model_cards_stay_where_the_report_wrote_them(repository: Path) -> None:
    """.dvcignore names them: they are no part of the stage's result, but not the user's either."""
    (repository / ".dvcignore").write_text("out/README.md\n")
    (repository / "out/README.md").write_text("card")
    assert reproduce(repository, "--single-item", "make")[0] == 0
    assert (repository / "out/README.md").read_text() == "card"
    assert not os.path.lexists(repository / "kept")
