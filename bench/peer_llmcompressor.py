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
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer

IGNORE = ["lm_head", "re:.*visual.*"]
LAYER = "Qwen2VLDecoderLayer"


def modifier(method: str, bits: int, group_size: int) -> AWQModifier | GPTQModifier:
    """AWQ or GPTQ with the library's defaults and asymmetric groups."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    kind = {"awq": AWQModifier, "gptq": GPTQModifier}[method]
    return kind(config_groups=groups, ignore=IGNORE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True, help="torch file with a list of input dicts")
    parser.add_argument("--method", choices=("awq", "gptq"), required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128)
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
        recipe=modifier(arguments.method, arguments.bits, arguments.group_size),
        sequential_targets=[LAYER],
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
