"""Quantize a checkpoint with llm-compressor, on calibration inputs made by bench.peers.

Runs in a separate environment (``make peers-env``), because llm-compressor pins other versions; imports nothing of this
project. The library uses a GPU if there is one. Writes the compressed checkpoint and measured.json: wall seconds of the
quantization itself, and peak MiB of the GPU's memory, or of resident memory without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer

IGNORE = ["lm_head", "re:.*visual.*", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


def modifier(arguments: argparse.Namespace) -> Modifier:
    """AWQ, GPTQ or AutoRound with the library's defaults; AutoRound without torch.compile, which needs a compiler."""
    weights = {"num_bits": arguments.bits, "type": "int", "symmetric": arguments.symmetric, "strategy": "channel"}
    if arguments.group_size is not None:
        weights |= {"strategy": "group", "group_size": arguments.group_size}
    if arguments.observer is not None:
        weights["observer"] = arguments.observer
    group = {"targets": ["Linear"], "weights": weights}
    if arguments.activation_bits is not None:
        activations = {"num_bits": arguments.activation_bits, "type": "int", "symmetric": True, "strategy": "token"}
        group["input_activations"] = {**activations, "dynamic": True}
    groups = {"group_0": group}
    if arguments.method == "autoround":
        return AutoRoundModifier(config_groups=groups, ignore=IGNORE, enable_torch_compile=False)
    kind = {"awq": AWQModifier, "gptq": GPTQModifier}[arguments.method]
    return kind(config_groups=groups, ignore=IGNORE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True, help="torch file with a list of input dicts")
    parser.add_argument("--method", choices=("awq", "gptq", "autoround"), required=True)
    parser.add_argument("--layer", default="Qwen2VLDecoderLayer", help="class of the decoder's layers")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, help="one scale per output channel without it")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--activation-bits", type=int, help="quantize activations too, per token")
    parser.add_argument("--observer", help="of the weights; by default the method's own")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.accelerator.is_available():  # AWQ pins memory, which needs an accelerator
        setattr(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)  # noqa: B010
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype)
    inputs = torch.load(arguments.inputs)
    started = time.perf_counter()
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(arguments.model),
        dataset=DataLoader(inputs, batch_size=None),
        recipe=modifier(arguments),
        sequential_targets=[arguments.layer],
        pipeline="sequential",
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(arguments.out, save_compressed=True)
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = Path("/proc/self/status").read_text()  # as in tlq.runtime.memory, not installed here
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    (arguments.out / "measured.json").write_text(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
