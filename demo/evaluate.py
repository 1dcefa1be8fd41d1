"""Score a checkpoint on the demo benchmarks by plain greedy generation: ``python -m demo.evaluate``.

This check of the demo model uses the strictest scorer: the reply must equal the answer. The benchmarks' scorers, which
the pipeline uses, accept at least the same replies. ``--blank`` replaces every picture by a grey one, to measure how
many answers can be guessed from the question alone.
"""

import argparse
import ast
import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText

from demo.make import BENCHMARKS
from demo.questions import LETTERS, SUFFIX
from tlq.models.processor import load_processor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateParams:
    model: Path = Path("data/demo/model")
    world: Path = Path("data/demo/world")
    items: int | None = None
    blank: bool = False
    batch: int = 50


@dataclass(frozen=True)
class Item:
    """One benchmark item: picture, text of the user turn, right reply, and sort of question."""

    image: Image.Image
    prompt: str
    answer: str
    sort: str


def read_item(benchmark: str, row: dict[str, Any]) -> Item:
    """The item of a row, with the same prompt as the benchmark's task."""
    text, suffix = row["question"], SUFFIX[BENCHMARKS[benchmark]]
    if benchmark == "mmmu":
        options = zip(LETTERS, ast.literal_eval(row["options"]), strict=True)
        lines = "".join(f"\n{letter}. {option}" for letter, option in options)
        text = text.replace("<image 1>", "").strip() + lines
        return Item(row["image_1"], text + suffix, row["answer"], row["subfield"])
    if benchmark == "textvqa":
        return Item(row["image"], text.capitalize() + suffix, row["answers"][0], "all")
    if benchmark == "chartqa":
        return Item(row["image"], text + suffix, row["answer"], row["type"])
    return Item(row["image"], text + suffix, row["answer"][0], row["question_type"])


def read_benchmark(world: Path, benchmark: str, items: int | None = None) -> list[Item]:
    """The first ``items`` items of a benchmark (all if None)."""
    path = world / f"{benchmark}.parquet"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; make it with `python -m demo.make --out {world}`")
    rows = load_dataset("parquet", data_files=str(path), split="train")
    return [read_item(benchmark, row) for row in rows.select(range(min(items or len(rows), len(rows))))]


@torch.no_grad()
def generate(
    model: Any, processor: Any, images: list[Image.Image], prompts: list[str], max_new_tokens: int = 12
) -> list[str]:
    """Greedy replies to one image-and-text turn each."""
    texts = []
    for prompt in prompts:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        texts.append(processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left").to(
        model.dtype
    )
    replies = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(replies[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def replies_of(model: Any, processor: Any, items: list[Item], params: EvaluateParams) -> list[str]:
    """Greedy replies to all items, in batches of ``params.batch``."""
    replies: list[str] = []
    for start in range(0, len(items), params.batch):
        part = items[start : start + params.batch]
        images = [Image.new("RGB", item.image.size, (128, 128, 128)) if params.blank else item.image for item in part]
        replies += generate(model, processor, images, [item.prompt for item in part])
    return replies


def score(items: list[Item], replies: list[str]) -> dict[str, float]:
    """Share of replies that equal the answer, overall and by sort."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for item, reply in zip(items, replies, strict=True):
        right = reply.strip().lower() == item.answer.lower()
        hits["all"].append(right)
        if item.sort != "all":
            hits[item.sort].append(right)
    return {sort: round(sum(flags) / len(flags), 4) for sort, flags in sorted(hits.items())}


def evaluate(params: EvaluateParams) -> dict[str, dict[str, float]]:
    """Scores by benchmark; ``mean`` is the mean of the benchmarks' overall scores."""
    model = AutoModelForImageTextToText.from_pretrained(params.model, dtype=torch.bfloat16).eval()
    processor = load_processor(params.model)
    scores = {}
    for benchmark in BENCHMARKS:
        items = read_benchmark(params.world, benchmark, params.items)
        scores[benchmark] = score(items, replies_of(model, processor, items, params))
        logger.info("%s (%d items): %s", benchmark, len(items), json.dumps(scores[benchmark]))
    scores["mean"] = {"all": round(sum(s["all"] for s in scores.values()) / len(scores), 4)}
    logger.info("mean: %s", scores["mean"]["all"])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a checkpoint on the demo benchmarks.")
    parser.add_argument("--model", type=Path, default=EvaluateParams.model)
    parser.add_argument("--world", type=Path, default=EvaluateParams.world)
    parser.add_argument("--items", type=int, help="items of each benchmark (default: all)")
    parser.add_argument("--blank", action="store_true", help="show a grey picture instead of the item's")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluate(EvaluateParams(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
