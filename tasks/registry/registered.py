"""Which variants of this workspace registered models are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tasks.files import MODELS
from tasks.registry.runs import CHECKPOINT
from tlq.runtime.digest import checkpoint_digest


class RegisteredError(ValueError):
    """A name stands for no model that this workspace can score."""


def find_variants(names: Sequence[str], variants: Sequence[str], client: MlflowClient, folder: Path) -> list[str]:
    """Variants that ``names`` stand for, in the order of ``variants`` and each once.

    Args:
        names: variants (`tlq-w3a16`), registered models (`demo-w3a16`: all whose checkpoint is here), versions
            (`demo-w3a16/2`) or aliases (`demo-w3a16@champion`).
        variants: those of params.yaml.
        folder: the project's folder, which holds models/.

    Raises:
        RegisteredError: no such model, version or alias; its recipe and scheme are not among ``variants``; or its
            checkpoint is not the one in models/ any more.
    """
    found: set[str] = set()
    for name in names:
        found |= {name} if name in variants else _registered(name, client, folder)
    unknown = sorted(found - set(variants))
    if unknown:
        raise RegisteredError(
            f"{', '.join(unknown)}: not among the variants of params.yaml ({', '.join(variants)}); "
            "add recipe and scheme to `variants`"
        )
    return [variant for variant in variants if variant in found]


def _registered(name: str, client: MlflowClient, folder: Path) -> set[str]:
    """Variants of a registered model, version or alias whose checkpoint is in models/ as it was registered."""
    versions = _versions(name, client)
    here = {version.tags["variant"] for version in versions if _is_here(version, folder)}
    if not here:
        made = sorted({version.tags.get("variant", "?") for version in versions})
        raise RegisteredError(
            f"{name}: its checkpoint ({', '.join(made)}) is not the one in {MODELS}/ any more; bring it back with "
            "`git checkout` of the commit in the version's tag git_commit and `dvc checkout`, or with `dvc exp apply`"
        )
    return here


def _versions(name: str, client: MlflowClient) -> list[ModelVersion]:
    try:
        if "@" in name:
            return [client.get_model_version_by_alias(*name.split("@", 1))]
        if "/" in name:
            return [client.get_model_version(*name.split("/", 1))]
        versions = list(client.search_model_versions(f"name = '{name}'"))
    except MlflowException as error:
        raise RegisteredError(f"{name}: {error.message}") from error
    if not versions:
        raise RegisteredError(f"{name}: neither a variant of params.yaml nor a registered model; see the MLflow UI")
    return versions


def _is_here(version: ModelVersion, folder: Path) -> bool:
    checkpoint = folder / MODELS / version.tags.get("variant", "?")
    return checkpoint.is_dir() and checkpoint_digest(checkpoint) == version.tags.get(CHECKPOINT)
