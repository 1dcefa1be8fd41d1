"""Find the variants of this workspace that registered models stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tasks.files import MODELS
from tasks.registry.runs import CHECKPOINT
from tasks.registry.versions import VARIANT, identity
from tlq.runtime.digest import checkpoint_digest


class RegisteredError(ValueError):
    """A name does not refer to a model that this workspace can score."""


def find_variants(names: Sequence[str], variants: Sequence[str], client: MlflowClient, folder: Path) -> list[str]:
    """Variants that ``names`` refer to, without duplicates and in the order of ``variants``.

    Args:
        names: variants (`tlq-w3a16`), registered models (`demo-w3a16`: all whose checkpoint is here), versions
            (`demo-w3a16/2`) or aliases (`demo-w3a16@champion`).
        variants: variants of params.yaml.
        folder: the project's folder, which holds models/.

    Raises:
        RegisteredError: a model, version or alias does not exist; its recipe and scheme are not among ``variants``; or
            its checkpoint is no longer in models/.
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
    """Variants of a registered model, version or alias whose registered checkpoint is in models/."""
    versions = _versions(name, client)
    here = {version.tags[VARIANT] for version in versions if _is_here(client, version, folder)}
    if not here:
        made = sorted({version.tags.get(VARIANT, "?") for version in versions})
        raise RegisteredError(
            f"{name}: its checkpoint ({', '.join(made)}) is no longer the one in {MODELS}/; bring it back with "
            "`git checkout` of the commit in its run's tag git_commit and `dvc checkout`, or with `dvc exp apply`"
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


def _is_here(client: MlflowClient, version: ModelVersion, folder: Path) -> bool:
    checkpoint = folder / MODELS / version.tags.get(VARIANT, "?")
    return checkpoint.is_dir() and checkpoint_digest(checkpoint) == identity(client, version).get(CHECKPOINT)
