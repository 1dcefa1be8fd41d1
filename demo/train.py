"""Train a demo model: ``torchrun --nproc-per-node 2 -m demo.train --stage vision``, then ``--stage decoder``.

``--family llava_onevision`` trains the second model class (demo.families); with ``--decoder data/demo/model`` its
decoder starts from the one of the shipped model.

There are two stages. Each has a budget of wall-clock minutes and resumes from its checkpoint in the work folder:

- ``vision`` trains the vision tower alone. Linear heads on its merged tokens, discarded afterwards, classify the
  content of each cell.
- ``decoder`` trains the decoder with a frozen vision tower, on several packed questions per picture (demo.packing).

Every step draws new pictures. The learning curve (share of exactly right answers on held-out scenes, by kind and skill)
is written to ``curve.jsonl`` in the work folder. ``python -m demo.export`` exports the last checkpoint as the shipped
model.
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
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2Tokenizer

from demo.balance import Balance
from demo.families import FAMILIES
from demo.family import Family
from demo.forward import answer_logits, answer_loss, turns_right, use_grouped_attention
from demo.model import load_or_build_tokenizer
from demo.optimizer import Optimizer
from demo.outliers import OutlierParams, remove_outliers
from demo.packing import Mix, Packer, draw_batch, draw_cells
from demo.questions import benchmark_questions
from demo.world import CELL_CLASSES, KINDS, random_scene

logger = logging.getLogger("demo.train")

Stage = Literal["vision", "decoder"]
STAGES: dict[Stage, dict[str, float]] = {  # default budget and rates of each stage
    "vision": {"minutes": 5.0, "images": 32, "muon_lr": 0.02, "decay": 0.6, "evaluate_minutes": 1.0},
    "decoder": {"minutes": 66.0, "images": 16, "muon_lr": 0.01, "decay": 0.45, "evaluate_minutes": 4.0},
}
BALANCE = 0.01  # weight of the loss that keeps experts equally busy
FEATURE_RMS = 0.25  # RMS of initial token embeddings, and of vision tokens at the start of the decoder stage


@dataclass(frozen=True)
class TrainParams:
    """Parameters of one stage; learning rates rise over ``warmup`` of the budget and fall to 0 over ``decay``."""

    stage: Stage
    work: Path
    minutes: float
    images: int
    muon_lr: float
    decay: float
    evaluate_minutes: float
    family: str = "qwen2_vl"
    decoder: Path | None = None  # trained demo model whose decoder the decoder stage starts from
    adam_lr: float = 2e-3
    seed: int = 0
    length: int = 158  # tokens of a sequence, without those of its picture
    warmup: float = 0.02
    evaluate_images: int = 64
    mix: Mix = field(default_factory=Mix)


@dataclass
class State:
    """Model, optimizer and progress of a stage."""

    family: Family
    model: Any
    heads: nn.ModuleDict
    optimizer: Optimizer
    balance: Balance | None = None
    step: int = 0
    seconds: float = 0.0


# --- processes ----------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join torchrun's process group; without torchrun, use a single process."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; where it emulates them, a step takes eight times as long."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def broadcast(value: float) -> float:
    """Broadcast the value of rank 0."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


# --- checkpoints --------------------------------------------------------------------------------------------------


def master_weights(state: State) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32, with the optimizer's masters of the trained parameters."""
    masters = {id(p): m for p, m in zip(state.optimizer.params, state.optimizer.masters, strict=True)}
    named = state.model.state_dict(keep_vars=True)
    return {name: masters.get(id(value), value.detach()).float() for name, value in named.items()}


def write_checkpoint(state: State, path: Path) -> None:
    """Write everything that a restart needs to a temporary file on rank 0, then rename it.

    Muon's momenta are equal on all ranks, so one file is enough.
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


def scale_features(family: Family, model: PreTrainedModel, seed: int) -> None:
    """Scale the last linear before the decoder so that vision tokens have RMS ``FEATURE_RMS``, like the others."""
    pixels, _ = draw_cells(family, 64, random.Random(seed))
    with torch.no_grad():
        rms = family.cells(model, pixels).square().mean().sqrt()
        last = family.last_linear(model)
        last.weight.mul_(FEATURE_RMS / rms)
        last.bias.mul_(FEATURE_RMS / rms)


def load_decoder(model: Any, trained: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Copy the decoder of a trained demo model, without its outlier channels, with which training would fail.

    Weights that the new decoder does not have, or has in another shape, are not copied: a decoder with experts starts
    with the attention and the embeddings of one without.

    Raises:
        ValueError: the trained model's tokenizer is another one, so that its embeddings belong to other tokens.
    """
    if Qwen2Tokenizer.from_pretrained(trained).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{trained}: its tokens are not those of the work folder's tokenizer; use a new work folder")
    source: Any = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32)
    remove_outliers(source, OutlierParams())
    own = model.model.language_model.state_dict()
    given = source.model.language_model.state_dict()
    own.update({name: value for name, value in given.items() if name in own and own[name].shape == value.shape})
    model.model.language_model.load_state_dict(own)
    model.lm_head.load_state_dict(source.lm_head.state_dict())


def start_state(params: TrainParams) -> State:
    """State of the stage's checkpoint if it exists; otherwise new weights, for the decoder with the trained tower."""
    torch.manual_seed(params.seed)
    family = FAMILIES[params.family]
    tokenizer = load_or_build_tokenizer(params.work / "tokenizer", params.decoder)
    model: Any = family.build_model(tokenizer)
    use_grouped_attention(model)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=FEATURE_RMS)
    width = model.lm_head.in_features
    heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in CELL_CLASSES.items()})
    checkpoint = params.work / f"{params.stage}.pt"
    saved: dict[str, Any] = {}
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["weights"])
    elif params.stage == "decoder":
        model.load_state_dict(torch.load(params.work / "vision.pt")["weights"])
        scale_features(family, model, params.seed)
        if params.decoder is not None:
            load_decoder(model, params.decoder, tokenizer)
    model.requires_grad_(params.stage == "decoder")
    for module in family.vision(model):
        module.requires_grad_(params.stage == "vision")
    optimizer = Optimizer(model, heads if params.stage == "vision" else None)
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    model.to(dtype)
    heads.to(dtype)
    state = State(family, model, heads, optimizer, family.balance(model))
    if saved:
        heads.load_state_dict(saved["heads"])
        optimizer.load_state_dict(saved["optimizer"])
        state.step, state.seconds = saved["step"], saved["seconds"]
    return state


# --- one step -----------------------------------------------------------------------------------------------------


def cell_loss(state: State, params: TrainParams, rng: random.Random) -> torch.Tensor:
    """Cross-entropy of every head over all cells, plus its cross-entropy over non-empty cells."""
    pixels, labels = draw_cells(state.family, params.images, rng)
    features = state.family.cells(state.model, pixels).flatten(0, 1)
    loss = features.new_zeros((), dtype=torch.float32)
    for name, head in state.heads.items():
        target = labels[name].flatten()
        losses = F.cross_entropy(head(features).float(), target, reduction="none")
        loss = loss + losses.mean() + losses[target > 0].mean()
    return loss


def rate(params: TrainParams, progress: float) -> float:
    """Factor of the learning rates after a share ``progress`` of the budget."""
    rise = min(1.0, (progress + 1e-3) / params.warmup) if params.warmup else 1.0
    fall = min(1.0, (1 - progress) / params.decay) if params.decay else 1.0
    return max(0.0, min(rise, fall))


def train_step(state: State, packer: Packer, params: TrainParams, progress: float) -> float:
    """Update once on new pictures; returns the loss of this rank."""
    rng = random.Random(f"{params.seed}-{params.stage}-{state.step}-{rank()}")
    if params.stage == "vision":
        loss = cell_loss(state, params, rng)
    else:
        batch = draw_batch(packer, params.images, params.mix, rng)
        with torch.no_grad():
            embeds = state.family.embeddings(state.model, batch.pixels)
        loss = answer_loss(answer_logits(state.model, batch, embeds), batch)
        if state.balance is not None:
            loss = loss + BALANCE * state.balance.loss()
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
    """Share of non-empty cells that each head classifies correctly, on pictures of a fixed seed."""
    pixels, labels = draw_cells(state.family, 4 * params.evaluate_images, random.Random(f"cells-{rank()}"))
    features = state.family.cells(state.model, pixels).flatten(0, 1)
    scores = {}
    for name, head in state.heads.items():
        target = labels[name].flatten()
        right = (head(features).argmax(-1) == target).float()
        scores[name] = right[target > 0].mean().item()
    return scores


@torch.no_grad()
def answer_accuracy(state: State, packer: Packer, params: TrainParams) -> dict[str, float]:
    """Share of exactly right answers to benchmark questions on test scenes, by kind and by skill."""
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
            logits = answer_logits(state.model, batch, state.family.embeddings(state.model, batch.pixels))
            for (name, skill), hit in zip(batch.skills, turns_right(logits, batch).tolist(), strict=True):
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
    """Measure the accuracy, log it and append it to the curve."""
    scores = cell_accuracy(state, params) if params.stage == "vision" else answer_accuracy(state, packer, params)
    if rank():
        return
    row = {"stage": params.stage, "minutes": round(state.seconds / 60, 1), "step": state.step, "loss": round(loss, 4)}
    logger.info("%s", json.dumps({**row, **{k: round(v, 3) for k, v in scores.items()}}))
    with (params.work / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps({**row, **scores}) + "\n")


# --- the loop -----------------------------------------------------------------------------------------------------


def train(params: TrainParams) -> None:
    """Run or resume one stage until the end of its budget."""
    if not rank():
        load_or_build_tokenizer(params.work / "tokenizer", params.decoder)
    if dist.is_initialized():
        dist.barrier()
    family = FAMILIES[params.family]
    tokenizer = load_or_build_tokenizer(params.work / "tokenizer")
    packer = Packer(tokenizer, params.length + family.image_tokens, family)
    state = start_state(params)
    if not rank():
        logger.info("%s from step %d, %.1f min spent", params, state.step, state.seconds / 60)
    loss, evaluated, clock = math.nan, state.seconds, time.monotonic()
    while (progress := broadcast(state.seconds / (60 * params.minutes))) < 1:
        step_loss = train_step(state, packer, params, progress)
        loss = step_loss if math.isnan(loss) else 0.95 * loss + 0.05 * step_loss
        state.step += 1
        state.seconds, clock = broadcast(state.seconds + time.monotonic() - clock), time.monotonic()
        if not rank() and state.step % 50 == 0:
            logger.info("step %d, %.1f min, loss %.3f", state.step, state.seconds / 60, loss)
        if state.seconds - evaluated > 60 * params.evaluate_minutes:
            evaluate(state, packer, params, loss)
            write_checkpoint(state, params.work / f"{params.stage}.pt")
            evaluated = state.seconds
    evaluate(state, packer, params, loss)
    write_checkpoint(state, params.work / f"{params.stage}.pt")


def parse(arguments: list[str] | None = None) -> TrainParams:
    parser = argparse.ArgumentParser(description="Train one stage of the demo model.")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--family", choices=list(FAMILIES))
    parser.add_argument("--decoder", type=Path, help="trained demo model whose decoder the stage starts from")
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
