"""Other tools in the study: llm-compressor and auto-round, on the samples and held-out items of ``bench.ablation``.

    make peers-env
    python -m bench.ablation_peers --seeds 0 1 2

Every run quantizes the checkpoint in the peers' environment (bench/peer_llmcompressor.py) and scores what it exports,
loaded as a user would load it. llm-compressor runs with its default ranges, from the smallest to the largest weight,
and with those that its observers search by the error of the weights (``mse``) or of the outputs (``imatrix_mse``).
auto-round runs through llm-compressor with 200 steps a layer, its default. Results are appended to the results of the
study; a run with a result is not repeated.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.ablation import KEY, SUBJECTS, Subject, append_result, finished_runs
from bench.laboratory import Laboratory, calibration_samples
from bench.peers import Peer, equal_length_inputs, load_dequantized, run_contender
from tasks.command import quiet_libraries
from tlq.export.loading import load_model
from tlq.quantization.formats import get_scheme
from tlq.samples import Sample, image_token_id

logger = logging.getLogger("bench.ablation_peers")

SAMPLES = 256
#: Decoder layer of each subject, which llm-compressor calibrates one after the other.
LAYERS = {
    "qwen2_vl": "Qwen2VLDecoderLayer",
    "other_kind": "Qwen2VLDecoderLayer",
    "llava_onevision": "Qwen2DecoderLayer",
}


PEERS = (
    Peer("llm-compressor awq", "awq"),
    Peer("llm-compressor awq", "awq", "mse"),
    Peer("llm-compressor gptq", "gptq"),
    Peer("llm-compressor gptq", "gptq", "mse"),
    Peer("llm-compressor gptq", "gptq", "imatrix_mse"),
    Peer("auto-round", "autoround"),
)


def run_study(
    subject: Subject, python: Path, seeds: Sequence[int], schemes: Sequence[str], items: int, only: Sequence[str]
) -> None:
    """Run every peer that has no result yet, and append its result."""
    done = finished_runs(subject)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        laboratory = Laboratory(items, work, subject.model, subject.benchmarks)
        for seed in seeds:
            keys = [
                (peer, scheme)
                for peer in PEERS
                for scheme in schemes
                if (peer.recipe, *peer.choice, scheme, seed) not in done
                and (not only or any(text in peer.name for text in only))
            ]
            if keys:
                write_inputs(calibration_samples(SAMPLES, seed, subject.sources), laboratory, work)
            for peer, name in keys:
                scheme = get_scheme(name)
                words = peer.command(python, subject.model, LAYERS[subject.name], scheme)
                words += ["--inputs", str(work / "inputs.pt"), "--out", str(work / "peer")]
                figures, out = run_contender(f"{peer.name}, {name}, seed {seed}", words)
                load_dequantized(out)
                measured = laboratory.measure(load_model(out, torch.float32), laboratory.reader)
                row = dict(zip(KEY, (peer.recipe, *peer.choice, name, seed), strict=True))
                append_result(subject, {**row, **measured, "seconds": round(figures["seconds"], 2)}, done)


def write_inputs(samples: list[Sample], laboratory: Laboratory, work: Path) -> None:
    """Write the model inputs of the samples, ``BATCH`` of equal length together, for the peers' environment."""
    image_id = image_token_id(laboratory.model.config)
    torch.save(equal_length_inputs(samples, laboratory.processor, image_id), work / "inputs.pt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--subject", choices=list(SUBJECTS), default="qwen2_vl", help="the model that is studied")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", default=["w3a16", "w2a16", "w4a8"])
    parser.add_argument("--items", type=int, default=100, help="held-out items per benchmark")
    parser.add_argument("--only", nargs="+", default=[], help="run only peers whose names contain these texts")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    if not arguments.python.exists():
        raise SystemExit(f"{arguments.python}: not found; run `make peers-env`")
    subject = SUBJECTS[arguments.subject]
    run_study(subject, arguments.python, arguments.seeds, arguments.schemes, arguments.items, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
