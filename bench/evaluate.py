"""Compare the evaluation's items per second on the demo with plain lm-eval, with its own loader and model class.

    python -m bench.evaluate --model data/demo/model --items 64 --batch 32

All contenders use the same model object, prompts, scorers and greedy decoding; each reads its data itself. The last row
also measures KL and NLL on the reference answers, a feature that lm-eval does not have.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager

from benchmarks.data import BenchmarkSource
from benchmarks.divergence import Divergence, ItemKey
from benchmarks.harness import FOLDER, load_benchmarks, run_benchmarks
from benchmarks.items import AnswerOptions
from tlq.export.loading import load_model
from tlq.models.processor import load_processor

TASKS = ("textvqa", "chartqa", "ocrbench", "mmmu")
MAX_NEW_TOKENS = 16


class Discard:
    """Meter that stores no result, to measure the cost of the forward passes alone."""

    def wants(self, key: ItemKey) -> bool:
        return True

    def measure(self, answers: Mapping[ItemKey, tuple[Sequence[int], torch.Tensor]]) -> dict[ItemKey, Divergence]:
        return {}


def ours(model: Any, processor: Any, items: int, batch: int, divergence: bool) -> int:
    """Evaluate with this project's harness; returns the number of items."""
    sources = [BenchmarkSource(f"demo_{name}", data=f"data/demo/world/{name}.parquet") for name in TASKS]
    meter = Discard() if divergence else None
    options = AnswerOptions(batch, MAX_NEW_TOKENS, meter)
    results = run_benchmarks(load_benchmarks(sources, items, 0), model, processor, options)
    return sum(len(result.items) for result in results)


def plain(model: Any, processor: Any, items: int, batch: int) -> int:
    """Evaluate with plain lm-eval; it receives the processor, since the one it would load needs torchvision."""

    class Plain(HFMultimodalLM):
        def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
            self.processor, self.tokenizer = processor, processor.tokenizer

    lm = Plain(pretrained=model, batch_size=batch, device=str(model.device))
    tasks = TaskManager(include_path=str(FOLDER), include_defaults=False).load([f"demo_{name}" for name in TASKS])
    for task in tasks["tasks"].values():
        task.set_config("num_fewshot", 0)
        task.set_config("generation_kwargs", {"max_gen_toks": MAX_NEW_TOKENS}, update=True)
    outcome = evaluate(lm, tasks, limit=items, bootstrap_iters=0, apply_chat_template=True)
    return sum(len(samples) for samples in outcome["samples"].values()) if outcome else 0


def rate(run: Callable[[], int]) -> tuple[float, float]:
    """Items per second of wall time, and per second of CPU time."""
    wall, processor = time.perf_counter(), time.process_time()
    items = run()
    return items / (time.perf_counter() - wall), items / (time.process_time() - processor)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="data/demo/model")
    parser.add_argument("--items", type=int, default=64, help="per benchmark")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = load_model(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(options.model)
    contenders: dict[str, Callable[[], int]] = {
        "lm-eval, batch 1": lambda: plain(model, processor, options.items, 1),
        f"lm-eval, batch {options.batch}": lambda: plain(model, processor, options.items, options.batch),
        f"ours, batch {options.batch}": lambda: ours(model, processor, options.items, options.batch, False),
        f"ours with NLL, batch {options.batch}": lambda: ours(model, processor, options.items, options.batch, True),
    }
    ours(model, processor, 2, options.batch, True)  # warm up
    lines = [f"{'':28}{'items/s':>10}{'items/cpu s':>14}"]
    for name, run in contenders.items():
        wall, cpu = rate(run)
        lines.append(f"{name:28}{wall:10.1f}{cpu:14.1f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
