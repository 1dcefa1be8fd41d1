"""Flow `evaluate`: score registered models again, for instance on more items or on another benchmark.

python -m flows.evaluate demo-w3a16@champion --limit 500
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner

from flows import parameters
from flows.artifacts import publish_overrides, publish_results
from flows.command import add_common_options, main, settings_of
from flows.form import Limit, Options
from flows.hooks import HOOKS
from flows.names import evaluation_name, experiment_name
from flows.stages import (
    LAST,
    ROOT,
    check_tracking,
    following,
    report_and_register,
    run_stage,
    stage,
    stages_at_once,
)
from tasks.config.params import section
from tasks.config.sections import VariantParams


@flow(
    name="evaluate",
    flow_run_name=evaluation_name,
    task_runner=ThreadPoolTaskRunner(max_workers=stages_at_once()),
    **HOOKS,
)
def evaluate(
    models: tuple[str, ...] = (),
    limit: Limit | None = None,
    again: bool = False,
    options: Options = Options(),
) -> str:
    """Score models again, report their scores and register them. Nothing is calibrated.

    The parameters given replace values of params.yaml for this run, which is saved as a DVC experiment. Returns the
    table of scores.

    Args:
        models: Registered models (demo-w3a16, demo-w3a16/2, demo-w3a16@champion) or variants (tlq-w3a16). Empty: every
            variant of params.yaml.
        limit: Items per benchmark, 0 for all. Empty: `evaluate.limit` of params.yaml.
        again: Score even if neither the model nor the benchmarks have changed.
        options: Other values of params.yaml, and promotion to champion.
    """
    values = parameters.overrides(limit=limit, options=options)
    publish_overrides(values, experiment_name())
    with parameters.overridden(values):
        variants = section("variants", VariantParams, parameters.PARAMS).names
        check_tracking()
        scored = find_models(models, variants) if models else variants
        with following(["baseline", *[f"evaluate@{variant}" for variant in scored], *LAST]):
            score(scored, again)
        return publish_results(["full", *variants])


def score(variants: Sequence[str], again: bool) -> None:
    """Score the full-precision model if it is stale, then the variants; then report and register them.

    Args:
        again: score variants that are not stale too.

    Raises:
        StageFailed: a stage failed.
    """
    run_stage("baseline")
    futures = [stage.submit(f"evaluate@{variant}", again) for variant in variants]
    for future in futures:
        future.result()
    report_and_register()


@task(task_run_name="find registered models")
def find_models(models: Sequence[str], variants: Sequence[str]) -> list[str]:
    """Variants that ``models`` refer to; each entry is a variant or a registered model."""
    from tasks.registry.connection import connect
    from tasks.registry.registered import find_variants

    return find_variants(models, variants, connect(), ROOT)


def add_options(parser: ArgumentParser) -> None:
    """Add an option for each parameter of the flow."""
    every = "registered models or variants; default: every variant of params.yaml"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=every)
    parser.add_argument("--again", action="store_true", help="score even if nothing has changed")
    add_common_options(parser)


def parameters_of(options: Namespace) -> dict[str, Any]:
    """The parameters of the flow that a command line gives."""
    further = Options(settings=settings_of(options), promote=options.promote)
    return {"models": tuple(options.models), "limit": options.limit, "again": options.again, "options": further}


if __name__ == "__main__":
    main(evaluate, __doc__, add_options, parameters_of)
