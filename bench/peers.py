"""Compare TLQ with llm-compressor on the same checkpoint, samples and scheme, with runs that take turns.

    make peers-env                               # llm-compressor in an environment of its own
    python -m bench.peers
    python -m bench.peers --models qwen2-vl-7b   # on a GPU

Every contender quantizes in a separate process (bench/peer_ours.py, bench/peer_llmcompressor.py). Measured are the wall
seconds of the quantization, with and without the scoring of token importance (which the pipeline does once for all
recipes and schemes), and the peak memory of the process. On the demo model the same code also scores all exported
checkpoints on the same held-out items; larger models with random weights yield time and memory only. Writes
docs/peers.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2VLConfig

from bench.laboratory import MODEL, Laboratory, calibration_samples
from bench.models import SHAPES, large_samples, write_random_model
from bench.sections import table, write_section
from tasks.command import quiet_libraries
from tlq.export.loading import load_model
from tlq.models.processor import load_processor
from tlq.quantization.formats import Scheme, get_scheme
from tlq.samples import Sample, encode_batches, image_token_id

logger = logging.getLogger("bench.peers")

OURS = ("awq", "gptq", "tlq", "tlq-c")
#: The model that needs a GPU.
LARGE = "qwen2-vl-7b"
#: Pairs (our recipe, peer) whose speed is compared.
RIVALS = (("tlq", "llm-compressor awq"), ("tlq-c", "llm-compressor gptq"))
BATCH = 8
#: Bits of the demo's schemes.
BITS = (3, 2)
#: Class of the decoder layers of the Qwen2-VL shapes.
LAYER = "Qwen2VLDecoderLayer"


@dataclass(frozen=True)
class Peer:
    """Another tool's method.

    Attributes:
        recipe: name of the row.
        method: of bench/peer_llmcompressor.py.
        observer: llm-compressor's observer of weights; None for the method's default.
    """

    recipe: str
    method: str
    observer: str | None = None

    @property
    def name(self) -> str:
        return self.recipe if self.observer is None else f"{self.recipe} with observer {self.observer}"

    @property
    def choice(self) -> tuple[str, str]:
        """Factor and level in the results of the study."""
        return ("default", "") if self.observer is None else ("observer", self.observer)

    def command(self, python: Path, model: Path, layer: str, scheme: Scheme) -> list[str]:
        """The command without its inputs, its dtype and its output.

        Args:
            python: interpreter of the peers' environment.
            layer: class of the model's decoder layers, which the method calibrates one after the other.
        """
        words = [str(python), "bench/peer_llmcompressor.py", "--model", str(model), "--method", self.method]
        words += ["--layer", layer, "--bits", str(scheme.weight_bits)]
        words += [] if scheme.group_size is None else ["--group-size", str(scheme.group_size)]
        words += ["--symmetric"] if scheme.symmetric else []
        words += [] if scheme.activation_bits is None else ["--activation-bits", str(scheme.activation_bits)]
        return words + ([] if self.observer is None else ["--observer", self.observer])


PEERS = (Peer("llm-compressor awq", "awq"), Peer("llm-compressor gptq", "gptq"))


@dataclass(frozen=True)
class Setup:
    """What all contenders share.

    Attributes:
        model: checkpoint to quantize.
        scheme: weight-only.
        python: interpreter of llm-compressor's environment.
        recipes: our recipes.
        device: `cpu` (float32) or `cuda` (bfloat16).
    """

    model: Path
    scheme: Scheme
    python: Path
    recipes: Sequence[str] = OURS
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"


def equal_length_inputs(samples: Sequence[Sample], processor: Any, image_id: int) -> list[dict[str, Tensor]]:
    """Model inputs in micro-batches of samples of equal length, so that no contender processes padding."""
    alone = encode_batches(samples, processor, image_id, 1, 10**6)
    of_length = {batch.samples[0]: batch.input_ids.shape[1] for batch in alone}
    inputs: list[dict[str, Tensor]] = []
    ranked = sorted(range(len(samples)), key=lambda index: (-of_length[index], index))
    for _, group in groupby(ranked, key=of_length.__getitem__):
        batches = encode_batches([samples[index] for index in group], processor, image_id, BATCH, 10**6)
        inputs += [batch.encode() for batch in batches]
    return inputs


def contenders(setup: Setup, work: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and command of every contender; each command writes to a folder in ``work``."""
    for peer in PEERS:
        command = peer.command(setup.python, setup.model, LAYER, setup.scheme)
        command += ["--inputs", str(work / "inputs.pt"), "--dtype", setup.dtype]
        yield peer.name, [*command, "--out", str(work / f"peer-{peer.method}")]
    for recipe in setup.recipes:
        command = [sys.executable, "-m", "bench.peer_ours", "--model", str(setup.model), "--recipe", recipe]
        command += ["--samples", str(work / "samples.pickle"), "--scheme", setup.scheme.name]
        command += ["--batch-size", str(BATCH), "--dtype", setup.dtype, "--device", setup.device]
        yield recipe, [*command, "--out", str(work / recipe)]


def run_contender(name: str, command: list[str]) -> tuple[dict[str, float], Path]:
    """Run a contender; returns its measured seconds and peak memory, and the folder of its checkpoint."""
    out = Path(command[command.index("--out") + 1])
    shutil.rmtree(out, ignore_errors=True)
    logger.info("%s", name)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-1500:]}")
    measured = json.loads((out / "measured.json").read_text())
    logger.info("%s", {name: round(value, 1) for name, value in measured.items()})
    return measured, out


def load_dequantized(folder: Path) -> None:
    """Let transformers load an asymmetric checkpoint written by llm-compressor (see tlq.export.loading)."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"dequantize": True, "ignore": ["lm_head", "re:.*visual.*"]}
    path.write_text(json.dumps(config))


def compare(setup: Setup, samples: list[Sample], repeats: int, lab: Laboratory | None) -> list[str]:
    """Markdown lines: a table with a row per contender, the ratios of seconds, and our seconds by phase.

    The table has seconds (median, min, max), peak MiB and, with ``lab``, KL and NLL gap.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "samples.pickle").write_bytes(pickle.dumps(samples))
        inputs = equal_length_inputs(samples, load_processor(setup.model), image_token_id(_config(setup.model)))
        torch.save(inputs, work / "inputs.pt")
        measured: dict[str, list[dict[str, float]]] = {}
        quality: dict[str, dict[str, float]] = {}
        for repeat in range(repeats):
            for name, command in contenders(setup, work):
                figures, out = run_contender(name, command)
                measured.setdefault(name, []).append(figures)
                if lab is not None and repeat == 0:
                    if name.startswith("llm-compressor"):
                        load_dequantized(out)
                    quality[name] = lab.measure(load_model(out, torch.float32), lab.reader)
    rows = [_row(name, runs, quality.get(name), lab) for name, runs in measured.items()]
    return [
        *table(rows),
        "",
        *(_ratio(measured, *rivals) for rivals in RIVALS),
        *(_by_phase(recipe, measured[recipe]) for recipe in setup.recipes),
    ]


def _ratio(measured: dict[str, list[dict[str, float]]], recipe: str, peer: str) -> str:
    """Seconds of ``peer`` over seconds of ``recipe``, run by run, with and without token importance."""
    texts = []
    for span in ("seconds", "layers"):
        ratios = [theirs["seconds"] / ours[span] for ours, theirs in zip(measured[recipe], measured[peer], strict=True)]
        texts.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"- {peer} took {texts[0]} times as long as {recipe}, {texts[1]} times as long as its calibration alone."


def _by_phase(recipe: str, runs: list[dict[str, float]]) -> str:
    """Median seconds of each phase of our calibration."""
    phases = [name for name in runs[0] if name not in ("seconds", "layers", "peak_mib")]
    texts = [f"{name} {np.median([run.get(name, 0.0) for run in runs]):.1f}" for name in phases]
    return f"- {recipe}, seconds by phase: {', '.join(texts)}."


def _config(model: Path) -> Any:
    return Qwen2VLConfig.from_pretrained(model)


def _row(
    name: str, runs: list[dict[str, float]], quality: dict[str, float] | None, lab: Laboratory | None
) -> dict[str, str]:
    row = {
        "contender": name,
        "seconds": _spread([run["seconds"] for run in runs]),
        "without importance": _spread([run.get("layers", run["seconds"]) for run in runs]),
        "peak MiB": f"{max(run['peak_mib'] for run in runs):.0f}",
    }
    if quality is not None and lab is not None:
        row |= {"KL": f"{quality['kl']:.4f}", "NLL gap": f"{quality['nll'] - lab.full['nll']:+.4f}"}
    return row


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--count", type=int, default=128, help="number of calibration samples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=("demo", "middle", LARGE), default=("demo", "middle"))
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=BITS,
        default=list(BITS),
        help="bits of the demo's schemes",
    )
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the models with random weights")
    parser.add_argument("--items", type=int, default=100, help="held-out items per benchmark")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        if "demo" in arguments.models:
            samples = calibration_samples(arguments.count)
            conditions = _conditions(arguments, samples, "cpu")
            lab = Laboratory(arguments.items, Path(folder))
            for bits in arguments.bits:
                scheme = get_scheme(f"w{bits}a16")
                rows = compare(Setup(MODEL, scheme, arguments.python), samples, arguments.repeats, lab)
                _write(f"Demo model, {_title(scheme)}", conditions, rows)
        for name in arguments.models:
            if name == "demo":
                continue
            large = name == LARGE
            samples = list(large_samples(arguments.count)) if large else calibration_samples(arguments.count)
            device = "cuda" if large else "cpu"
            conditions = _conditions(arguments, samples, device)  # fails before the work if GPU or peers are missing
            shape = replace(SHAPES[name], layers=arguments.layers)
            model = write_random_model(Path(folder) / name, shape)
            recipes = [recipe for recipe in OURS if recipe != "awq"]  # our `awq` takes minutes and is in no ratio
            setup = Setup(model, get_scheme("w3a16"), arguments.python, recipes, device)
            rows = compare(setup, samples, arguments.repeats, None)
            _write(f"Random weights, {shape}, {shape.layers} layers, {_title(setup.scheme)}", conditions, rows)


def _title(scheme: Scheme) -> str:
    return f"{scheme.name.upper()} in groups of {scheme.group_size}"


def _write(title: str, conditions: str, rows: list[str]) -> None:
    """Write a section of docs/peers.md; other sections keep their earlier measurements."""
    write_section(Path("docs/peers.md"), title, [conditions, "", *rows], "Comparison with llm-compressor")


def _conditions(arguments: argparse.Namespace, samples: Sequence[Sample], device: str) -> str:
    peer = subprocess.run(
        [str(arguments.python), "-c", "from importlib.metadata import version as v; print(v('llmcompressor'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    on_gpu = device == "cuda"
    where = f"{torch.cuda.get_device_name()} in bfloat16" if on_gpu else f"{os.cpu_count()} cores in float32"
    return (
        f"All contenders used {len(samples)} calibration samples in batches of {BATCH} of equal length and ran "
        f"{arguments.repeats} time(s), in turn, on {where}. The table has median seconds (least to most) and the "
        f"largest peak of {'GPU' if on_gpu else 'resident'} memory. Our seconds include loading and saving the model, "
        f"those of llm-compressor do not. KL and NLL, if given, are per answer token on {4 * arguments.items} "
        "held-out items. "
        f"The versions were llm-compressor {peer} and torch {version('torch')}. "
        "`python -m bench.peers` wrote this section."
    )


if __name__ == "__main__":
    main()
