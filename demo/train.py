"""Train the demo model: `torchrun --nproc-per-node 2 -m demo.train --stage vision`, then `--stage decoder`.

Two stages, each with a budget of wall-clock minutes, each resumable from its own checkpoint in the work folder:

- `vision`: the vision tower alone. Linear heads on its merged tokens, thrown away afterwards, name what the renderer
  drew in each cell.
- `decoder`: the decoder alone, on questions packed several to a picture (demo.packing), the vision tower frozen.

Pictures are drawn afresh at every step. The curve (share of held-out answers exactly right, by kind and skill) goes to
`curve.jsonl` in the work folder. `python -m demo.export` makes the shipped model of the last checkpoint.
"""

import argparse
import json
import logging
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from demo.forward import answer_logits, answer_loss, encode_images, turns_right, use_grouped_attention
from demo.model import build_model, load_or_build_tokenizer
from demo.optimizer import Optimizer
from demo.packing import Mix, Packer, draw_batch, draw_cells
from demo.questions import benchmark_questions
from demo.world import CELL_CLASSES, KINDS, random_scene

logger = logging.getLogger("demo.train")

Stage = Literal["vision", "decoder"]
STAGES: dict[Stage, dict[str, float]] = {  # budget and rates of each stage where none are given
    "vision": {"minutes": 5.0, "images": 32, "muon_lr": 0.02, "decay": 0.6, "evaluate_minutes": 1.0},
    "decoder": {"minutes": 66.0, "images": 16, "muon_lr": 0.01, "decay": 0.45, "evaluate_minutes": 4.0},
}
FEATURE_RMS = 0.25  # of token embeddings at the start, and of vision tokens at the start of the decoder stage


@dataclass(frozen=True)
class TrainParams:
    """What one stage does; learning rates rise over `warmup` and fall linearly to zero over `decay` of the budget."""

    stage: Stage
    work: Path
    minutes: float
    images: int
    muon_lr: float
    decay: float
    evaluate_minutes: float
    adam_lr: float = 2e-3
    seed: int = 0
    length: int = 208
    warmup: float = 0.02
    evaluate_images: int = 64
    mix: Mix = field(default_factory=Mix)


@dataclass
class State:
    """What a stage is working on, and how far it has come."""

    model: Qwen2VLForConditionalGeneration
    heads: nn.ModuleDict
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0


# --- processes ----------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join the process group that torchrun describes; without torchrun, go on alone."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)


def agree(value: float) -> float:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


# --- checkpoints --------------------------------------------------------------------------------------------------


def master_weights(state: State) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32, with the optimizer's masters where it has them."""
    masters = {id(p): m for p, m in zip(state.optimizer.params, state.optimizer.masters, strict=True)}
    named = state.model.state_dict(keep_vars=True)
    return {name: masters.get(id(value), value.detach()).float() for name, value in named.items()}


def write_checkpoint(state: State, path: Path) -> None:
    """Rank 0 writes everything that a restart needs, under a temporary name first.

    Muon's momenta are equal on all ranks, so one file serves all.
    """
    if rank():
        return
    temporary = path.with_suffix(".tmp")
    content = {
        "weights": master_weights(state),
        "heads": state.heads.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
    }
    torch.save(content, temporary)
    temporary.replace(path)


def scale_features(model: Qwen2VLForConditionalGeneration, seed: int) -> None:
    """Scale the merger's last linear so that vision tokens start at FEATURE_RMS, like the token embeddings."""
    pixels, _ = draw_cells(64, random.Random(seed))
    with torch.no_grad():
        rms = encode_images(model.model.visual, pixels).square().mean().sqrt()
        last = model.model.visual.merger.mlp[2]
        last.weight.mul_(FEATURE_RMS / rms)
        last.bias.mul_(FEATURE_RMS / rms)


def start_state(params: TrainParams) -> State:
    """The stage's own checkpoint if there is one; else fresh weights, with the vision stage's tower for the decoder."""
    torch.manual_seed(params.seed)
    model = build_model(load_or_build_tokenizer(params.work / "tokenizer"))
    use_grouped_attention(model)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=FEATURE_RMS)
    width = model.lm_head.in_features
    heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in CELL_CLASSES.items()})
    own = params.work / f"{params.stage}.pt"
    saved: dict[str, Any] = {}
    if own.exists():
        saved = torch.load(own)
        model.load_state_dict(saved["weights"])
    elif params.stage == "decoder":
        model.load_state_dict(torch.load(params.work / "vision.pt")["weights"])
        scale_features(model, params.seed)
    model.requires_grad_(params.stage == "decoder")
    model.model.visual.requires_grad_(params.stage == "vision")
    optimizer = Optimizer(model, heads if params.stage == "vision" else None)
    model.bfloat16()
    heads.bfloat16()
    state = State(model, heads, optimizer)
    if saved:
        heads.load_state_dict(saved["heads"])
        optimizer.load_state_dict(saved["optimizer"])
        state.step, state.seconds = saved["step"], saved["seconds"]
    return state


# --- one step -----------------------------------------------------------------------------------------------------


def cell_loss(
    model: Qwen2VLForConditionalGeneration, heads: nn.ModuleDict, params: TrainParams, rng: random.Random
) -> torch.Tensor:
    """Cross-entropy of every head over all cells, plus again over the cells that hold something."""
    pixels, labels = draw_cells(params.images, rng)
    features = encode_images(model.model.visual, pixels).flatten(0, 1)
    loss = features.new_zeros((), dtype=torch.float32)
    for name, head in heads.items():
        target = labels[name].flatten()
        losses = F.cross_entropy(head(features).float(), target, reduction="none")
        loss = loss + losses.mean() + losses[target > 0].mean()
    return loss


def rate(params: TrainParams, progress: float) -> float:
    """Factor on the learning rates when a share `progress` of the budget is spent."""
    rise = min(1.0, (progress + 1e-3) / params.warmup) if params.warmup else 1.0
    fall = min(1.0, (1 - progress) / params.decay) if params.decay else 1.0
    return max(0.0, min(rise, fall))


def train_step(state: State, packer: Packer, params: TrainParams, progress: float) -> float:
    """One update on fresh pictures; returns the loss of this rank."""
    rng = random.Random(f"{params.seed}-{params.stage}-{state.step}-{rank()}")
    if params.stage == "vision":
        loss = cell_loss(state.model, state.heads, params, rng)
    else:
        batch = draw_batch(packer, params.images, params.mix, rng)
        with torch.no_grad():
            embeds = encode_images(state.model.model.visual, batch.pixels)
        loss = answer_loss(answer_logits(state.model, batch, embeds), batch)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"stage {params.stage}, step {state.step}: loss is {loss.item()}; lower the learning rates"
        )
    loss.backward()
    factor = rate(params, progress)
    state.optimizer.step(params.muon_lr * factor, params.adam_lr * factor)
    return loss.item()


# --- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def cell_accuracy(state: State, params: TrainParams) -> dict[str, float]:
    """Share of non-empty cells that each head names rightly, on pictures drawn for the purpose."""
    pixels, labels = draw_cells(4 * params.evaluate_images, random.Random(f"cells-{rank()}"))
    features = encode_images(state.model.model.visual, pixels).flatten(0, 1)
    scores = {}
    for name, head in state.heads.items():
        target = labels[name].flatten()
        right = (head(features).argmax(-1) == target).float()
        scores[name] = right[target > 0].mean().item()
    return scores


@torch.no_grad()
def answer_accuracy(state: State, packer: Packer, params: TrainParams) -> dict[str, float]:
    """Share of benchmark questions on test scenes answered exactly right, by kind and by skill within it."""
    right: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kind in KINDS:
        rng = random.Random(f"evaluate-{kind}-{rank()}")
        items = []
        for _ in range(params.evaluate_images):
            scene = random_scene(kind, "test", rng)
            questions = benchmark_questions(scene, rng)
            items.append((scene, rng.sample(questions, len(questions))))
        for i in range(0, len(items), 32):
            batch = packer.pack(items[i : i + 32])
            for (name, skill), hit in zip(
                batch.skills, turns_right(answer_logits(state.model, batch), batch).tolist(), strict=True
            ):
                for key in (name, f"{name}/{skill}"):
                    right[key][0] += hit
                    right[key][1] += 1
    keys = sorted(right)
    counts = torch.tensor([right[key] for key in keys])
    if dist.is_initialized():
        gathered = [torch.zeros_like(counts) for _ in range(world_size())]
        dist.all_gather(gathered, counts)
        counts = torch.stack(gathered).sum(0)
    return {key: round((hits / total).item(), 3) for key, (hits, total) in zip(keys, counts, strict=True)}


def evaluate(state: State, packer: Packer, params: TrainParams, loss: float) -> None:
    """Measure, log and append to the curve."""
    scores = cell_accuracy(state, params) if params.stage == "vision" else answer_accuracy(state, packer, params)
    if rank():
        return
    row = {"stage": params.stage, "minutes": round(state.seconds / 60, 1), "step": state.step, "loss": round(loss, 4)}
    logger.info("%s", json.dumps({**row, **{k: round(v, 3) for k, v in scores.items()}}))
    with (params.work / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps({**row, **scores}) + "\n")


# --- the loop -----------------------------------------------------------------------------------------------------


def train(params: TrainParams) -> None:
    """Run or resume one stage until its budget is spent."""
    if not rank():
        load_or_build_tokenizer(params.work / "tokenizer")
    if dist.is_initialized():
        dist.barrier()
    packer = Packer(load_or_build_tokenizer(params.work / "tokenizer"), params.length)
    state = start_state(params)
    if not rank():
        logger.info("%s from step %d, %.1f min spent", params, state.step, state.seconds / 60)
    loss, measured, clock = math.nan, state.seconds, time.monotonic()
    while (progress := agree(state.seconds / (60 * params.minutes))) < 1:
        now_loss = train_step(state, packer, params, progress)
        loss = now_loss if math.isnan(loss) else 0.95 * loss + 0.05 * now_loss
        state.step += 1
        state.seconds, clock = agree(state.seconds + time.monotonic() - clock), time.monotonic()
        if not rank() and state.step % 50 == 0:
            logger.info("step %d, %.1f min, loss %.3f", state.step, state.seconds / 60, loss)
        if state.seconds - measured > 60 * params.evaluate_minutes:
            evaluate(state, packer, params, loss)
            write_checkpoint(state, params.work / f"{params.stage}.pt")
            measured = state.seconds
    evaluate(state, packer, params, loss)
    write_checkpoint(state, params.work / f"{params.stage}.pt")


def parse(arguments: list[str] | None = None) -> TrainParams:
    parser = argparse.ArgumentParser(description="Train one stage of the demo model.")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--seed", type=int, default=TrainParams.seed)
    parser.add_argument("--minutes", type=float, help="wall-clock budget of the stage")
    parser.add_argument("--images", type=int, help="pictures per step and process")
    for name in ("muon-lr", "decay", "evaluate-minutes"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--mix", type=json.loads, default={}, help=f"JSON of changes to {asdict(Mix())}")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return TrainParams(**{**STAGES[given["stage"]], **given, "mix": Mix(**given["mix"])})


def main() -> None:
    params = parse()
    params.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    start_processes()
    train(params)


if __name__ == "__main__":
    main()
