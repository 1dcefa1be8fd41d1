"""Tiny random models of every family in every engine that can be had here, compared with transformers.

    python -m bench.engines.families
    python -m bench.engines.families --families qwen3_vl --engines llama.cpp --again
    python -m bench.engines.families --summarise

Every family of tests/support/families.py is built, in full precision and as `w4a16s` (rounded to nearest), converted
if its engine needs that, and loaded in a process of its own with a time limit. The probabilities of every token of an
answer, after text and after an image and text, are compared with those of `tlq.load_model` in float32 on the same
checkpoint. Results go to bench/results/engine-families.json one by one, and what is there is not run again without
``--again``; ``--summarise`` writes the table of docs/engines.md from them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines import environments
from bench.engines.__main__ import FULL, SCRIPTS
from bench.engines.tiny_checkpoints import checkpoint, prompts
from bench.sections import table, write_section
from tasks.command import quiet_libraries
from tlq import quantize
from tlq.export import mlx
from tlq.export.containers import GGUF_FAMILIES
from tlq.export.convert import write_container
from tlq.export.engines import ENGINES
from tlq.export.quantized import QuantizedCheckpoint
from tlq.models.families import FAMILIES

logger = logging.getLogger("bench.engines.families")

RESULTS = Path("bench/results/engine-families.json")
PAGE = Path("docs/engines.md")
QUANTIZED = "w4a16s"
#: Engine -> the forms that it is given.
FORMS: dict[str, tuple[str, ...]] = {
    "vllm-cpu": (FULL, QUANTIZED),
    "mlx": (QUANTIZED,),
    "llama.cpp": (FULL, "q8_0"),
}

_SCHEMES = list(dict.fromkeys(scheme for schemes in FORMS.values() for scheme in schemes))
#: The most that a family in the lists of ``tlq convert`` may differ from the reference, in nats.
MOST_KL = 1e-2
#: Layers that vLLM's build for CPUs has in bfloat16 alone.
_ROUNDED_ALONE = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7")
#: How the reason begins for which an image was not tried.
UNCOMPARED = "not compared"

_SECONDS = 240
_TESTS = Path("tests")


def main() -> int:
    sys.path.insert(0, str(_TESTS))
    from support.families import TINY

    parser = argparse.ArgumentParser(description="Load tiny models of every family in engines.")
    parser.add_argument("--families", nargs="+", default=list(TINY), choices=list(TINY), metavar="FAMILY")
    parser.add_argument("--engines", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--schemes", nargs="+", default=_SCHEMES, choices=_SCHEMES)
    parser.add_argument("--again", action="store_true", help="also run what has a result")
    parser.add_argument("--unlisted", action="store_true", help="also convert to MLX what `tlq convert` refuses")
    parser.add_argument("--summarise", action="store_true", help="write the table of the page from the results")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    logging.getLogger("gguf").setLevel("WARNING")
    quiet_libraries()
    if arguments.unlisted:
        mlx.MLX_FAMILIES = tuple(FAMILIES)
    if not arguments.summarise:
        for name in arguments.families:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    measure(name, arguments.engines, arguments.schemes, Path(folder), arguments.again)
                except Exception:
                    logger.exception("%s: not measured; the other families follow", name)
    summarise([FamilyResult(**row) for row in _stored()])
    return 0


@dataclass(frozen=True)
class FamilyResult:
    """What an engine did with a family.

    Attributes:
        scheme: of the checkpoint, or ``full``.
        refused: what the engine said when it loaded the checkpoint; empty if it did.
        text_kl, image_kl: the largest divergence from float32 of a token of the answer, in nats; None if none was
            measured.
        text_refused, image_refused: why there is none.
        text_bfloat16, image_bfloat16: the same of `tlq.load_model` in bfloat16, in which some kernels compute.
    """

    family: str
    engine: str
    scheme: str
    refused: str = ""
    text_kl: float | None = None
    image_kl: float | None = None
    text_refused: str = ""
    image_refused: str = ""
    text_bfloat16: float | None = None
    image_bfloat16: float | None = None


def measure(name: str, engines: Sequence[str], schemes: Sequence[str], folder: Path, again: bool) -> None:
    """Run a family in every engine that has no result of it yet."""
    from support.families import TINY

    known = set() if again else {(row["engine"], row["scheme"]) for row in _stored() if row["family"] == name}
    wanted = [
        (engine, scheme)
        for engine in engines
        for scheme in FORMS[engine]
        if scheme in schemes
        and (engine, scheme) not in known
        and (engine != "llama.cpp" or TINY[name].name in GGUF_FAMILIES)
    ]
    if not wanted:
        return
    source = checkpoint(name, folder / FULL)
    job = {"prompts": prompts(name, source, folder), "token_types": (TINY[name].token_types or "").split()}
    for scheme in dict.fromkeys(scheme for _, scheme in wanted):
        exported = source
        if scheme != FULL:
            exported = folder / scheme
            quantize(source, exported, [], "rtn", scheme)
        reference = _run("in_tlq.py", None, {**job, "path": str(exported), "dtype": "float32"})
        if "refused" in reference:
            raise RuntimeError(f"{name} as {scheme} in tlq.load_model, the reference: {reference['refused']}")
        for engine in [engine for engine, each in wanted if each == scheme]:
            try:
                loaded = _container(engine, exported, folder / f"{scheme}-{engine}")
            except Exception as error:  # noqa: BLE001  a fault of a conversion is a result too
                keep(FamilyResult(name, engine, scheme, refused=f"tlq convert: {str(error).split(';')[0]}"))
                continue
            rounded = engine == "vllm-cpu" and (scheme != FULL or TINY[name].model_type in _ROUNDED_ALONE)
            dtype = "bfloat16" if rounded else "float32"
            keep(_compared(name, engine, scheme, {**job, "path": str(loaded), "dtype": dtype}, reference))


def _container(engine: str, exported: Path, out: Path) -> Path:
    """The form of a checkpoint that an engine loads."""
    if engine == "vllm-cpu":
        return exported
    plain = "quantization_config" not in json.loads((exported / "config.json").read_text())
    opened = QuantizedCheckpoint.in_full_precision(exported) if plain else QuantizedCheckpoint.open(exported)
    write_container(opened, ENGINES[engine].container, out)
    return out


def _run(script: str, engine: str | None, job: dict[str, Any]) -> dict[str, Any]:
    """The result of an engine's script, in a process of its own."""
    python = Path(sys.executable) if engine is None else environments.python(engine)
    vocabulary = json.loads((Path(job["path"]) / "config.json").read_text()) if engine != "llama.cpp" else {}
    size = vocabulary.get("text_config", vocabulary).get("vocab_size", 512)
    with tempfile.TemporaryDirectory() as folder:
        stated, result, log = (Path(folder) / each for each in ("job.json", "result.json", "log.txt"))
        stated.write_text(json.dumps({"new_tokens": 0, "vocabulary": size, **job}))
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [str(python.absolute()), str(Path(__file__).with_name(script)), str(stated), str(result)]
        with log.open("w") as stream:
            try:
                done = subprocess.run(
                    command, env=environment, stdout=stream, stderr=stream, timeout=_SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                return {"refused": f"no result after {_SECONDS} s"}
        if result.exists():
            return dict(json.loads(result.read_text()))
        lines = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        telling = [line for line in lines if re.search("assert|error|abort", line, re.IGNORECASE)] or lines[-1:]
        return {"refused": f"ended with status {done.returncode}: {telling[0]}"}


def _compared(name: str, engine: str, scheme: str, job: dict[str, Any], reference: dict[str, Any]) -> FamilyResult:
    """What an engine did with a checkpoint; with text alone if it does not load it with images."""
    script = SCRIPTS[engine]
    found = _run(script, engine, job)
    fields: dict[str, Any] = {}
    if "refused" in found and len(job["prompts"]) > 1:
        fields["image_refused"] = found["refused"]
        found = _run(script, engine, {**job, "prompts": job["prompts"][:1], "limits": {"image": 0, "video": 0}})
    elif "refused" in found and engine == "vllm-cpu":
        found = _run(script, engine, {**job, "limits": {"image": 0, "video": 0}})
    if "refused" in found:
        return FamilyResult(name, engine, scheme, refused=found["refused"])
    for kind, here, there in zip(("text", "image"), found["answers"], reference["answers"], strict=False):
        if "refused" in there:
            fields[f"{kind}_refused"] = f"the reference: {there['refused']}"
        elif "refused" in here:
            fields[f"{kind}_refused"] = here["refused"]
        else:
            fields[f"{kind}_kl"] = divergence(here["log_probabilities"], there["log_probabilities"])
        if "bfloat16" in there:
            fields[f"{kind}_bfloat16"] = divergence(there["bfloat16"], there["log_probabilities"])
    if len(job["prompts"]) == 1:
        fields["image_refused"] = f"{UNCOMPARED}: its processor needs torchvision"
    return FamilyResult(name, engine, scheme, **fields)


def divergence(here: list[list[float]], there: list[list[float]]) -> float:
    """The largest KL of a position, in nats; never negative where rounded probabilities do not sum to 1."""
    found, expected = np.array(here), np.array(there)
    return float((np.exp(expected) * (expected - found) - np.exp(expected) + np.exp(found)).sum(-1).max())


def _stored() -> list[dict[str, Any]]:
    return list(json.loads(RESULTS.read_text())) if RESULTS.exists() else []


def keep(result: FamilyResult) -> None:
    """Put a result into the file, in the place of an older one."""
    key = (result.family, result.engine, result.scheme)
    rows = [row for row in _stored() if (row["family"], row["engine"], row["scheme"]) != key]
    rows.append(vars(result))
    rows.sort(key=lambda row: (row["family"], row["engine"], row["scheme"]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    words = (
        result.refused or f"text {result.text_kl} {result.text_refused} image {result.image_kl} {result.image_refused}"
    )
    logger.info("%s in %s as %s: %s", result.family, result.engine, result.scheme, " ".join(words.split())[:300])


def summarise(results: Sequence[FamilyResult]) -> None:
    """Write the table of what ran, and what the engines said of the rest, into the page of engines."""
    by_key = {(each.family, each.engine, each.scheme): each for each in results}
    columns = [(engine, scheme) for engine, schemes in FORMS.items() for scheme in schemes]
    said: dict[str, list[str]] = {}
    rows = []
    for family in dict.fromkeys(each.family for each in results):
        row = {"family": f"`{family}`"}
        for engine, scheme in columns:
            result = by_key.get((family, engine, scheme))
            row[f"{engine}, {scheme}"] = "" if result is None else cell(result)
            for words in [] if result is None else refusals(result):
                said.setdefault(words, []).append(f"`{family}` in {engine} as {scheme}")
        rows.append(row)
    notes = [f"- {', '.join(where)}: {words}" for words, where in said.items()]
    from support.families import TINY

    missing = [f"`{name}`" for name in TINY if name not in {each.family for each in results}]
    not_run = [f"Not run yet: {', '.join(missing)}.", ""] if missing else []
    write_section(PAGE, "Families", [*_EXPLANATION, "", *table(rows), "", *not_run, _SAID, "", *notes], "Engines")


def cell(result: FamilyResult) -> str:
    """What was measured with text, and with an image, in one cell."""
    if result.refused:
        return "refused"
    kinds = (
        (result.text_kl, result.text_refused, result.text_bfloat16),
        (result.image_kl, result.image_refused, result.image_bfloat16),
    )
    return " / ".join(_measured(*kind, result.engine == "vllm-cpu") for kind in kinds)


def _measured(kl: float | None, refused: str, rounded: float | None, computes_rounded: bool) -> str:
    if kl is None:
        return "-" if refused.startswith(UNCOMPARED) else "refused"
    beside = f" ({rounded:.0e})" if rounded is not None and computes_rounded else ""
    return f"{kl:.0e}{beside}".replace("e-0", "e-")


def refusals(result: FamilyResult) -> list[str]:
    """What an engine said of a checkpoint, of text and of an image, shortened to a line each."""
    said = {"": result.refused, "text: ": result.text_refused, "an image: ": result.image_refused}
    lines = [
        f"{kind}{' '.join(words.split())}" for kind, words in said.items() if words and not words.startswith(UNCOMPARED)
    ]
    return [line[:_WORDS].replace("|", "\\|") for line in lines]


_WORDS = 200
_EXPLANATION = (
    "`python -m bench.engines.families --unlisted` built a tiny random model of every family (two decoder layers, real "
    "classes) and loaded it, each in a process of its own: in full precision, and rounded to nearest as the scheme "
    "of the column. The numbers are KL from `tlq.load_model` in float32 on the same checkpoint, in nats, the largest "
    "of the tokens of an answer: after text / after an image and text; `-`: the project's processor needs torchvision, "
    "so no image was compared. vLLM computes `w4a16s` in bfloat16; the number in brackets is `tlq.load_model` in "
    "bfloat16. Only vLLM 0.32's build for CPUs was run, on a CPU with AVX-512; llama.cpp computes with weights in F16.",
)
_SAID = (
    "What the engines said of what they refused. A missing field of a config, a token or a shape may be a matter of "
    "the tiny model, whose config has fewer fields than a published one:"
)


if __name__ == "__main__":
    sys.exit(main())
