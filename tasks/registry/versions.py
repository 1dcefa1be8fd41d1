"""Versions in the MLflow registry: four tags for the list of versions, and a description that explains them.

The tags are `variant`, `score` (mean score in percent), `gate` (passed or failed) and `outcome` (of the comparison with
the champion). The description has the scores, and the reasons under the headings Gate and Champion. The checkpoint, the
evaluation and the scores that identify a result are tags of the version's run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tasks.registry.connection import pages
from tasks.registry.gate import Verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

VARIANT, SCORE, GATE, OUTCOME = "variant", "score", "gate", "outcome"
_GATE_HEADING, _CHAMPION_HEADING = "Gate", "Champion"
_PASSED = "The version passed."


def model_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a model in order of their numbers."""
    found = pages(lambda token: client.search_model_versions(f"name = '{name}'", page_token=token))
    return sorted(found, key=lambda version: int(version.version))


def aliases(client: MlflowClient, name: str) -> dict[str, int]:
    """Version number of every alias of a model."""
    return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}


def identity(client: MlflowClient, version: ModelVersion) -> Mapping[str, str]:
    """Tags of the version's run; empty if other software registered the version, or if the run is gone."""
    from mlflow.exceptions import MlflowException

    if not version.run_id:
        return {}
    try:
        return dict(client.get_run(str(version.run_id)).data.tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def described(scores: str, verdict: Verdict, champion: str = "") -> str:
    """Description of a new version. ``champion`` says why it takes no part in the choice of the champion."""
    return _with_section(_with_section(scores, _GATE_HEADING, _verdict_text(verdict)), _CHAMPION_HEADING, champion)


def verdict_tag(verdict: Verdict) -> dict[str, str]:
    return {GATE: "passed" if verdict.passed else "failed"}


def verdict_of(version: ModelVersion) -> Verdict:
    """The verdict with which the version is registered."""
    lines = _section(version.description or "", _GATE_HEADING).splitlines()
    return Verdict(tuple(line.removeprefix("- ") for line in lines if line.startswith("- ")))


def set_verdict(client: MlflowClient, version: ModelVersion, verdict: Verdict) -> None:
    set_tag(client, version, GATE, verdict_tag(verdict)[GATE])
    _explain(client, version, _GATE_HEADING, _verdict_text(verdict))


def set_outcome(client: MlflowClient, version: ModelVersion, outcome: str, reason: str) -> None:
    set_tag(client, version, OUTCOME, outcome)
    _explain(client, version, _CHAMPION_HEADING, reason)


def forget_outcome(client: MlflowClient, version: ModelVersion) -> None:
    """Delete the outcome and its reason, so that the version is compared again."""
    if OUTCOME in version.tags:
        client.delete_model_version_tag(version.name, version.version, OUTCOME)
    _explain(client, version, _CHAMPION_HEADING, "")


def set_tag(client: MlflowClient, version: ModelVersion, name: str, value: str) -> None:
    if version.tags.get(name) != value:
        client.set_model_version_tag(version.name, version.version, name, value)


def _explain(client: MlflowClient, version: ModelVersion, heading: str, body: str) -> None:
    """Replace one section of the description. It is read first: another process may have changed another section."""
    old = client.get_model_version(version.name, version.version).description or ""
    new = _with_section(old, heading, body)
    if new != old:
        client.update_model_version(version.name, version.version, new)


def _verdict_text(verdict: Verdict) -> str:
    return "\n".join(f"- {reason}" for reason in verdict.reasons) or _PASSED


def _pattern(heading: str) -> re.Pattern[str]:
    return re.compile(rf"\n\n## {heading}\n\n(.*?)(?=\n\n## |\Z)", re.DOTALL)


def _section(text: str, heading: str) -> str:
    found = _pattern(heading).search(text)
    return found[1] if found else ""


def _with_section(text: str, heading: str, body: str) -> str:
    """The text with the section under ``heading`` replaced, or added at the end; without it if ``body`` is empty."""
    section = f"\n\n## {heading}\n\n{body}" if body else ""
    pattern = _pattern(heading)
    return pattern.sub(lambda _: section, text, count=1) if pattern.search(text) else text + section
