"""Items per second of the evaluation against plain lm-eval with its own loader and model class, on the demo.

    python -m bench.evaluate --model data/demo/model --items 64 --batch 32

Same model object, prompts, scorers and greedy decoding; each contender reads its data itself. The last row also
measures the reference answers, which lm-eval has nothing like.
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
from benchmarks.model import AnswerOptions
from tlq.models.checkpoint import load_model
from tlq.models.processor import load_processor

log = logging.getLogger(__name__)

TASKS = ("textvqa", "chartqa", "ocrbench", "mmmu")
MAX_NEW_TOKENS = 16


class Discard:
    """Meter that measures and keeps nothing, for the cost alone."""

    def wants(self, key: ItemKey) -> bool:
        return True

    def measure(self, answers: Mapping[ItemKey, tuple[Sequence[int], torch.Tensor]]) -> dict[ItemKey, Divergence]:
        return {}


def ours(model: Any, processor: Any, items: int, batch: int, divergence: bool) -> int:
    sources = [BenchmarkSource(f"demo_{name}", data=f"data/demo/world/{name}.parquet") for name in TASKS]
    meter = Discard() if divergence else None
    options = AnswerOptions(batch, MAX_NEW_TOKENS, meter)
    results = run_benchmarks(load_benchmarks(sources, items, 0), model, processor, options)
    return sum(len(result.items) for result in results)


def plain(model: Any, processor: Any, items: int, batch: int) -> int:
    """lm-eval as it comes; the processor is handed over because it looks for one on disk that needs torchvision."""

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
    """Items per second of wall time, and per second of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    items = run()
    return items / (time.perf_counter() - wall), items / (time.process_time() - processor)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="data/demo/model")
    parser.add_argument("--items", type=int, default=64, help="per benchmark")
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = load_model(given.model, device="cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(given.model)
    contenders: dict[str, Callable[[], int]] = {
        "lm-eval, batch 1": lambda: plain(model, processor, given.items, 1),
        f"lm-eval, batch {given.batch}": lambda: plain(model, processor, given.items, given.batch),
        f"ours, batch {given.batch}": lambda: ours(model, processor, given.items, given.batch, False),
        f"ours with NLL, batch {given.batch}": lambda: ours(model, processor, given.items, given.batch, True),
    }
    ours(model, processor, 2, given.batch, True)  # warm up
    lines = [f"{'':28}{'items/s':>10}{'items/cpu s':>14}"]
    for name, run in contenders.items():
        wall, cpu = rate(run)
        lines.append(f"{name:28}{wall:10.1f}{cpu:14.1f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
