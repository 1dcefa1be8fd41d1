"""Which inference engine runs which number format, and how: the one place that states it.

The command line, the refusal of a scheme that an engine does not run, the model cards and docs/engines.md are derived
from ``ENGINES``. Every row says where it was read, or that it was run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tlq.models.stored import read_json
from tlq.quantization.formats import FULL_PRECISION, SCHEMES, Scheme, get_scheme

#: ``native``: kernels that compute on the codes, activations as the scheme says. ``weight only``: kernels that read the
#: codes, while 8-bit activations stay in 16 bits. ``dequantized``: 16-bit weights in memory, made when it loads.
Runs = Literal["native", "weight only", "dequantized", "refused"]


@dataclass(frozen=True)
class Support:
    """What an engine does with a scheme.

    Attributes:
        note: kernels, conditions and flags.
        source: where that was read, or `run`.
    """

    runs: Runs
    note: str
    source: str


@dataclass(frozen=True)
class Engine:
    """An engine on a class of devices.

    Attributes:
        support: what it does with a scheme (without overrides).
    """

    name: str
    title: str
    version: str
    support: Callable[[Scheme], Support]

    def of(self, scheme: Scheme) -> Support:
        """What it does with a checkpoint: what it does with its worst part."""
        parts = [self.support(part) for part in parts_of(scheme)]
        return max(parts, key=lambda part: ("native", "weight only", "dequantized", "refused").index(part.runs))


def _kind(scheme: Scheme) -> str:
    activations = 16 if scheme.activation_bits is None else scheme.activation_bits
    return f"w{scheme.weight_bits}a{activations}"


def _vllm(scheme: Scheme) -> Support:
    read = "vLLM 0.33.0, compressed_tensors/schemes"
    match _kind(scheme):
        case "w2a16" | "w3a16":
            return Support(
                "native", "Humming kernels alone; they are compiled with nvcc when it loads (sm75 and newer)", read
            )
        case "w4a16":
            faster = "; VLLM_MARLIN_INPUT_DTYPE=int8 computes in 8 bits on Ampere and Ada" if scheme.symmetric else ""
            return Support("native", f"Marlin, on H100 Machete{faster}", f"{read}, vllm#29901")
        case "w4a8":
            return Support(
                "weight only",
                "Marlin or Machete; `--linear-backend humming` quantizes activations too",
                f"{read}, vllm#38064",
            )
        case "w8a8":
            return Support("native", "Cutlass", read)
    return Support("refused", f"no kernel for {_kind(scheme)}", read)


def _vllm_cpu(scheme: Scheme) -> Support:
    match _kind(scheme):
        case "w2a16" | "w3a16":
            return Support(
                "refused", "Failed to find a kernel that can implement the WNA16 linear layer", "run (0.32.0)"
            )
        case "w4a16":
            return Support("native", "x86 with AVX-512; without it cpu_gemm_wna16 is missing", "run (0.32.0)")
        case "w4a8":
            return Support("weight only", "x86 with AVX-512, as W4A16", "vLLM 0.33.0")
        case "w8a8":
            return Support("native", "same answers as transformers", "run (0.32.0)")
    return Support("refused", f"no kernel for {_kind(scheme)}", "vLLM 0.33.0")


def _sglang(scheme: Scheme) -> Support:
    read = "SGLang 0.5.23, compressed_tensors"
    match _kind(scheme):
        case "w4a16":
            return Support("native", "Marlin (sm80 and newer)", read)
        case "w8a8":
            return Support("native", "Cutlass", read)
    return Support("refused", f"no scheme for {_kind(scheme)}", read)


def _transformers(scheme: Scheme) -> Support:
    note = "needs compressed-tensors 0.18: older ones pack 3 bits otherwise" if scheme.weight_bits == 3 else ""
    return Support("dequantized", note, "run (5.23, compressed-tensors 0.20)")


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vLLM, NVIDIA", "0.33", _vllm),
        Engine("vllm-cpu", "vLLM, CPU", "0.32", _vllm_cpu),
        Engine("sglang", "SGLang, NVIDIA", "0.5.23", _sglang),
        Engine("transformers", "transformers", "5.23", _transformers),
    )
}


def get_engine(name: str) -> Engine:
    """The engine called ``name``. Raises ValueError if there is none."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(name: str, scheme: Scheme) -> Support:
    """What the engine called ``name`` does with a scheme.

    Raises:
        ValueError: there is no such engine, or it refuses the scheme; the message names the nearest that it runs.
    """
    engine = get_engine(name)
    found = engine.of(scheme)
    if found.runs == "refused":
        raise ValueError(
            f"{engine.title} {engine.version} does not run {scheme.name} ({found.note}); the nearest scheme that it "
            f"runs is {nearest(engine, scheme).name}"
        )
    return found


def nearest(engine: Engine, scheme: Scheme) -> Scheme:
    """The scheme that an engine runs whose weights, then activations, have the nearest number of bits."""

    def distance(other: Scheme) -> tuple[int, int, bool]:
        activations = abs((other.activation_bits or 16) - (scheme.activation_bits or 16))
        return abs(other.weight_bits - scheme.weight_bits), activations, other.symmetric != scheme.symmetric

    return min((each for each in SCHEMES.values() if engine.of(each).runs != "refused"), key=distance)


def parts_of(scheme: Scheme) -> Iterator[Scheme]:
    """The schemes of which a checkpoint consists, each without overrides."""
    yield replace(scheme, overrides=())
    yield from (get_scheme(name) for _, name in scheme.overrides if name != FULL_PRECISION)


def schemes_of(checkpoint: Path) -> list[Scheme]:
    """The number formats of a compressed-tensors checkpoint, read from its config.

    Raises:
        FileNotFoundError: it has no config.json.
        ValueError: it is not quantized with integers in the form of compressed-tensors.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; give the folder of a quantized checkpoint")
    stated = read_json(file).get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"{file}: names no quantization by compressed-tensors; give the folder of a quantized checkpoint"
        )
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{file}: quantization_config has no config_groups; download it again")
    return list(dict.fromkeys(_scheme_of(file, group) for group in groups.values()))


def _scheme_of(file: Path, group: Any) -> Scheme:
    try:
        weights, inputs = group["weights"], group.get("input_activations")
        if weights["type"] != "int":
            raise ValueError(f"{file}: has weights of type {weights['type']}; integers are known only")
        own = Scheme(
            "", weights["num_bits"], weights["group_size"], weights["symmetric"], inputs and inputs["num_bits"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its config_groups cannot be read ({error!r}); download it again") from error
    name = next((each.name for each in SCHEMES.values() if _form(each) == _form(own)), _kind(own))
    return replace(own, name=name)


def _form(scheme: Scheme) -> tuple[int, bool, int | None]:
    return scheme.weight_bits, scheme.symmetric, scheme.activation_bits


def table(schemes: list[Scheme]) -> str:
    """What every engine does with the schemes, as a table of markdown."""
    lines = ["| scheme | engine | runs | how | source |", "|---|---|---|---|---|"]
    for scheme in schemes:
        for engine in ENGINES.values():
            found = engine.of(scheme)
            lines.append(
                f"| {scheme.name} | {engine.title} {engine.version} | {found.runs} | {found.note} | {found.source} |"
            )
    return "\n".join(lines) + "\n"
