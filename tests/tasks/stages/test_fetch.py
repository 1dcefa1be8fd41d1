"""Stage `fetch`: it downloads the pinned files completely, and refuses unusable downloads early."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants
from support.stand_in_hub import COMMIT, Hub, hub_of
from support.tiny import png

from tasks.config.presets import newest_commit
from tasks.config.sections import Columns, Download, PrepareParams
from tasks.stages import fetch as module
from tasks.stages.fetch import fetch
from tasks.stages.prepare import prepare


def parquet(folder: Path, answers: list[str]) -> bytes:
    path = folder / "rows.parquet"
    images = [{"bytes": png(index), "path": None} for index in range(len(answers))]
    pd.DataFrame({"image": images, "question": "Which?", "answer": answers}).to_parquet(path)
    return path.read_bytes()


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model, a model of an unsupported family, and a data set in two files and two splits."""
    model = {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()}
    repositories = {
        "maker/tiny-VL": {**model, "pytorch_model.bin": b"not wanted", "README.md": b"---\nlicense: mit\n---\n"},
        "maker/odd": {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"large"},
        "datasets/maker/questions": {
            "README.md": b"# Questions",
            "data/train-00000-of-00002.parquet": parquet(tmp_path, ["ONE", "TWO"]),
            "data/train-00001-of-00002.parquet": parquet(tmp_path, ["THREE"]),
            "data/test-00000-of-00001.parquet": parquet(tmp_path, ["FOUR"]),
        },
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with hub_of(repositories) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


def model(repo: str = "maker/tiny-VL", revision: str = COMMIT) -> Download:
    return Download(kind="model", repo=repo, revision=revision, out="data/models/tiny")


def names(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_model_is_downloaded_completely_and_without_other_files(hub: Hub, tiny_checkpoint: Path) -> None:
    fetch(model())
    expected = {file.name for file in tiny_checkpoint.iterdir()} | {"README.md"}
    assert names("data/models/tiny") == expected
    weights = "model.safetensors"
    assert (Path("data/models/tiny") / weights).read_bytes() == (tiny_checkpoint / weights).read_bytes()
    assert [path.name for path in Path("data/models").iterdir()] == ["tiny"]


def test_only_the_config_of_an_unsupported_family_is_downloaded(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"model type 'bert' is not supported.*choose a model of one of: qwen2_vl"):
        fetch(model("maker/odd"))
    assert hub.loaded == ["config.json"]


def test_files_of_a_data_set_are_chosen_by_pattern_and_read_by_prepare(hub: Hub) -> None:
    fetch(
        Download(
            kind="calibration",
            repo="maker/questions",
            revision=COMMIT,
            out="data/calibration/questions",
            files=("data/train-*",),
        )
    )
    assert len(names("data/calibration/questions")) == 2
    params = PrepareParams(kind="hub", path="data/calibration/questions", samples=3, columns=Columns())
    assert prepare(params, Path("data/prepared")) == (3, [])


def test_an_interrupted_download_keeps_what_it_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = module.snapshot_download

    def cut_short(*args: object, **kwargs: object) -> object:
        """Fail after the first files, like a lost connection."""
        if kwargs["allow_patterns"] == list(module.MODEL_FILES) and not kwargs["dry_run"]:
            loaded(*args, **{**kwargs, "allow_patterns": ["*.json"]})  # type: ignore[arg-type]
            raise ConnectionError("reset by peer")
        return loaded(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(module, "snapshot_download", cut_short)
        with pytest.raises(OSError, match=r"maker/tiny-VL at 0123456789ab cannot be downloaded .*reset by peer"):
            fetch(model())
    assert not Path("data/models/tiny").exists()
    before = list(hub.loaded)
    fetch(model())
    assert not set(hub.loaded[len(before) :]) & set(before)
    assert "model.safetensors" in names("data/models/tiny")


def test_another_commit_replaces_the_folder(hub: Hub) -> None:
    stale = Path("data/models/tiny/old.safetensors")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another commit")
    fetch(model())
    assert not stale.exists()


def test_a_branch_is_refused_as_revision() -> None:
    with pytest.raises(ValueError, match="revision of maker/tiny-VL is 'main', must be a commit"):
        model(revision="main")


def test_an_unknown_repository_is_named(hub: Hub) -> None:
    with pytest.raises(OSError, match="maker/nothing at 0123456789ab cannot be downloaded .*check the hub id"):
        fetch(model("maker/nothing"))


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the hub's client notices too, and goes on
def test_a_small_disk_is_refused_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"GiB are to be downloaded, 0\.0 GiB are free"):
        fetch(model())
    assert hub.loaded == ["config.json"]


def test_the_newest_commit_comes_from_the_hub(hub: Hub) -> None:
    assert newest_commit("maker/tiny-VL", "model") == COMMIT
    assert newest_commit("maker/questions", "dataset") == COMMIT
    with pytest.raises(ConnectionError, match=r"maker/nothing: .*--revision maker/nothing=COMMIT"):
        newest_commit("maker/nothing", "model")
