"""One job for bench.memory in a process of its own; writes the memory and seconds that the job took."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import load_benchmarks, run_streamed
from benchmarks.items import AnswerOptions
from benchmarks.source import BenchmarkSource
from tlq.api import quantize
from tlq.calibration.job import CalibrationJob
from tlq.importance.gradients import score_tokens
from tlq.importance.token_set import TokenBudget
from tlq.models.processor import load_processor
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.needs import plan_calibration, plan_importance
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import get_recipe
from tlq.runtime.memory import peak_resident
from tlq.samples import encode_batches, image_token_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "job",
        choices=("importance", "quantize", "score"),
        help="importance alone, or also calibration and export, or the answers of 16 items of the demo world by the "
        "backend `streamed`",
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True, help="pickled samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--recipe", default="tlq-c")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per layer")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    samples = pickle.loads(arguments.samples.read_bytes())
    # Four grid points are enough: their number affects time, but not memory.
    recipe = get_recipe(arguments.recipe)
    recipe = replace(recipe, equalization=replace(recipe.equalization, points=4))
    scheme, alone = get_scheme("w3a16"), Ranks()
    started = time.perf_counter()
    model = StreamedModel(arguments.model)
    batches = encode_batches(
        samples, load_processor(model.folder), image_token_id(model.config), arguments.batch_size, 4096
    )
    start = peak_resident()
    plans = [plan_importance(model, batches, alone)]
    if arguments.job == "importance":
        score_tokens(model, batches)
    elif arguments.job == "score":
        plans = []  # it has no plan
        benchmarks = load_benchmarks([BenchmarkSource("demo_textvqa")], 16, 0)
        run_streamed(benchmarks, model, load_processor(model.folder), AnswerOptions(arguments.batch_size))
    else:
        job = CalibrationJob(recipe, WeightQuantizer(scheme, model.checkpoint_dtype), batches, ranks=alone)
        plans.append(plan_calibration(model, job, arguments.tokens))
        del model, batches, job
        budget = TokenBudget(arguments.tokens)
        quantize(
            arguments.model, arguments.out, samples, recipe, scheme, budget=budget, batch_size=arguments.batch_size
        )
    measured = {
        "start": start,
        "peak": peak_resident(),
        "planned": max((plan.device + plan.host for plan in plans), default=None),
        "seconds": time.perf_counter() - started,
    }
    arguments.measured.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
