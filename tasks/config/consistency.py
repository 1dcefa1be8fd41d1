"""Checks between sections of params.yaml, for the first seconds of a run: gate, engine, real models on demo inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.config.params import ParamsError, parse
from tasks.config.sections import CalibrateParams, EvaluateParams, ExportParams, RegisterParams, VariantParams
from tlq.export.engines import check_engine
from tlq.models.architectures import Architecture

#: Folder of the demo's model, calibration data and benchmark files.
DEMO_FOLDER = Path("data/demo")
_DEMO_TASK = "demo_"


def check_gate(content: Mapping[str, Any]) -> None:
    """Check that a version can pass the gate. Without section `register` or `evaluate` there is nothing to check.

    Args:
        content: every section of a params file.

    Raises:
        ParamsError: a floor names a task that is not evaluated, or a limit is below `register.min_items` although the
            run moves the aliases.
    """
    if "register" not in content or "evaluate" not in content:
        return
    register = parse("register", content["register"], RegisterParams)
    evaluate = parse("evaluate", content["evaluate"], EvaluateParams)
    _check_floors(register, evaluate)
    if register.promote and register.min_items is not None:
        _check_limits(register.min_items, evaluate)


def _check_floors(register: RegisterParams, evaluate: EvaluateParams) -> None:
    tasks = [source.task for source in evaluate.benchmarks]
    unknown = [name for name in register.floors if name not in ("mean", *tasks)]
    if unknown:
        raise ParamsError(
            f"register.floors: {', '.join(unknown)} not among evaluate.benchmarks ({', '.join(tasks)}), so no version "
            "can pass the gate; remove the floor, correct its name, or add the benchmark"
        )


def _check_limits(least: int, evaluate: EvaluateParams) -> None:
    for source in evaluate.benchmarks:
        name, limit = ("evaluate.limit", evaluate.limit) if source.limit is None else (source.task, source.limit)
        if limit is not None and limit < least:
            raise ParamsError(
                f"{name}: the limit is {limit} items, register.min_items needs at least {least}, so no version can "
                "pass the gate; raise the limit, lower register.min_items, or set register.promote to false"
            )


def check_served(
    content: Mapping[str, Any], schemes: Sequence[str] | None = None, architecture: Architecture | None = None
) -> None:
    """Check that the engine of `export.engine`, if one is named, runs the schemes (by default those of the variants).

    Args:
        architecture: of the model, if it is known.

    Raises:
        ParamsError: it refuses one; the message names the nearest that it runs.
    """
    engine = parse("export", content.get("export") or {}, ExportParams).engine
    if engine is None or "calibrate" not in content:
        return
    if schemes is None:
        schemes = parse("variants", content["variants"], VariantParams).schemes if "variants" in content else ()
    calibrate = parse("calibrate", content["calibrate"], CalibrateParams)
    for name in schemes:
        try:
            check_engine(engine, calibrate.scheme(name), architecture)
        except ValueError as error:
            raise ParamsError(f"export.engine: {error}; change variants.schemes, or export.engine") from error


def demo_inputs(content: Mapping[str, Any]) -> dict[str, str]:
    """Inputs of the demo that a params file has for a real model, in words, by kind of preset.

    The result is empty for the demo model, and for a file without section `model`.
    """
    if _is_demo((content.get("model") or {}).get("path", DEMO_FOLDER)):
        return {}
    data = (content.get("prepare") or {}).get("path")
    sources = (content.get("evaluate") or {}).get("benchmarks") or []
    tasks = [each["task"] for each in sources if each["task"].startswith(_DEMO_TASK) or _is_demo(each.get("data"))]
    inputs = {}
    if _is_demo(data):
        inputs["calibration"] = f"calibrated on demo data ({data})"
    if tasks:
        inputs["benchmarks"] = f"scored on demo benchmarks ({', '.join(tasks)})"
    return inputs


def _is_demo(path: str | Path | None) -> bool:
    return path is not None and Path(path).is_relative_to(DEMO_FOLDER)
