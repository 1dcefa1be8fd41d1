"""Registered models, versions and aliases are found in the workspace, or refused with the next step."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.registry.registered import RegisteredError, find_variants
from tasks.registry.runs import CHECKPOINT, new_run
from tlq.runtime.digest import checkpoint_digest

VARIANTS = ("rtn-w3a16", "tlq-w3a16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder with two checkpoints, of which the first was registered once before."""
    folder = tmp_path_factory.mktemp("registered")
    for variant in VARIANTS:
        (folder / "models" / variant).mkdir(parents=True)
        (folder / "models" / variant / "config.json").write_text(f'"{variant}"')
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> MlflowClient:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.create_registered_model("demo-w3a16")
    digests = ["of an earlier checkpoint", *(checkpoint_digest(folder / "models" / variant) for variant in VARIANTS)]
    for variant, found in zip(("rtn-w3a16", *VARIANTS), digests, strict=True):
        run_id = new_run(client, "tlq", variant, {CHECKPOINT: found})
        client.create_model_version("demo-w3a16", str(folder), run_id=run_id, tags={"variant": variant})
    client.set_registered_model_alias("demo-w3a16", "champion", "3")
    return client


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["tlq-w3a16"], ["tlq-w3a16"]),
        (["demo-w3a16/2"], ["rtn-w3a16"]),
        (["demo-w3a16@champion"], ["tlq-w3a16"]),
        (["demo-w3a16"], ["rtn-w3a16", "tlq-w3a16"]),
        (["demo-w3a16@champion", "rtn-w3a16", "demo-w3a16/3"], ["rtn-w3a16", "tlq-w3a16"]),
    ],
)
def test_names_are_resolved_to_variants(names: list[str], found: list[str], client: MlflowClient, folder: Path) -> None:
    assert find_variants(names, VARIANTS, client, folder) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "demo-w3a16/1",
            r"demo-w3a16/1: its checkpoint \(rtn-w3a16\) is no longer the one in models/; bring it back",
        ),
        ("demo-w3a16/7", "demo-w3a16/7: .*not found"),
        ("demo-w3a16@best", "demo-w3a16@best: .*not found"),
        ("demo-w4a8", "demo-w4a8: neither a variant of params.yaml nor a registered model"),
    ],
)
def test_names_that_cannot_be_scored_are_refused(name: str, message: str, client: MlflowClient, folder: Path) -> None:
    with pytest.raises(RegisteredError, match=message):
        find_variants([name], VARIANTS, client, folder)


def test_a_variant_that_params_yaml_lacks_is_refused(client: MlflowClient, folder: Path) -> None:
    with pytest.raises(RegisteredError, match=r"tlq-w3a16: not among the variants of params.yaml \(rtn-w3a16\)"):
        find_variants(["demo-w3a16@champion"], ["rtn-w3a16"], client, folder)
