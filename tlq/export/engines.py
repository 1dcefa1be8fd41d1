"""Which inference engine runs which number format, and how: the one place that states it.

The command line, the refusal of a scheme that an engine does not run, the model cards and docs/engines.md are derived
from ``ENGINES``. Every row says where it was read, or that it was run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tlq.export.containers import GGUF_FAMILIES, MLX_FAMILIES, MLX_GROUPS, gguf_block, mlx_group
from tlq.models.architectures import Architecture
from tlq.models.families import FAMILIES
from tlq.models.text_decoders import DECODERS
from tlq.quantization.formats import FULL_PRECISION, MIXED, SCHEMES, Scheme, get_scheme

#: ``native``: kernels that compute on the codes, activations as the scheme says. ``weight only``: kernels that read the
#: codes, while 8-bit activations stay in 16 bits. ``dequantized``: 16-bit weights in memory, made when it loads.
Runs = Literal["native", "weight only", "dequantized", "refused"]


#: What `tlq quantize` writes.
CHECKPOINT = "compressed-tensors"


@dataclass(frozen=True)
class Support:
    """What an engine does with a scheme.

    Attributes:
        note: kernels, conditions and flags.
        source: where that was read, or `run`.
        needs: instructions of the CPU (in the words of /proc/cpuinfo) without which it refuses.
        differs: why its numbers are not those of transformers, which computes as the scores were measured.
        dtype: the dtype of activations nearest to float32 that its kernels take.
    """

    runs: Runs
    note: str
    source: str
    needs: str | None = None
    differs: str = ""
    dtype: str = "float32"

    @property
    def how(self) -> str:
        """Everything to know about it but the source."""
        return "; ".join(part for part in (self.note, self.differs) if part)


@dataclass(frozen=True)
class FamilyNote:
    """What an engine does with one family, other than with the rest.

    Attributes:
        refused: why it does not run the family's checkpoints; empty if it does.
        differs: why its numbers are not those of transformers.
        flag: of the command that serves a folder, where the family needs one.
    """

    refused: str = ""
    differs: str = ""
    flag: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine on a class of devices.

    Attributes:
        container: what it loads: the checkpoint as written, or what `tlq convert` makes of it.
        support: what it does with a scheme (without overrides).
        command: how a folder is served, after ``{folder}``; empty where that takes a program.
        families: those that its container has, by the ``model_type`` of config.json; None for every one.
        experts: whether it loads quantized experts.
        joined: whether it loads several quantized linears from one tensor.
        notes: what it does otherwise with a family, by the ``model_type`` of config.json.
    """

    name: str
    title: str
    version: str
    container: str
    support: Callable[[Scheme], Support]
    command: str = ""
    families: tuple[str, ...] | None = None
    experts: bool = True
    joined: bool = True
    notes: Mapping[str, FamilyNote] = field(default_factory=dict)

    def of(self, scheme: Scheme) -> Support:
        """What it does with a checkpoint: what it does with its worst part."""
        parts = [self.support(part) for part in parts_of(scheme)]
        if scheme.budget is not None:  # the mix will use no scheme that the engine refuses
            parts = [part for part in parts if part.runs != "refused"] or parts
        return max(parts, key=lambda part: ("native", "weight only", "dequantized", "refused").index(part.runs))

    def of_checkpoint(self, scheme: Scheme, family: str, experts: bool) -> Support:
        """What it does with a checkpoint of a family, by its ``model_type``, that has experts or not."""
        found = self.of(scheme)
        if self.families is not None and family not in self.families:
            return Support("refused", f"no {self.container} of the family {family}", found.source)
        if experts and not self.experts:
            return Support("refused", "does not run quantized experts; `tlq.load_model` loads them", found.source)
        if not self.joined and family in FAMILIES and FAMILIES[family].joined:
            note = "does not load quantized linears that a checkpoint keeps in one tensor; `tlq.load_model` loads them"
            return Support("refused", note, found.source)
        special = self.notes.get(family)
        if special is None or found.runs == "refused":
            return found
        if special.refused:
            return Support("refused", special.refused, found.source)
        return replace(found, differs="; ".join(part for part in (found.differs, special.differs) if part))

    def served(self, folder: str, family: str) -> str:
        """The command that serves a folder with a checkpoint of a family."""
        special = self.notes.get(family, FamilyNote())
        return f"{self.command.format(folder=folder)} {special.flag}".rstrip()


def _vllm(scheme: Scheme) -> Support:
    read = "vLLM 0.33.0, compressed_tensors/schemes"
    match scheme.kind:
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
                differs="activations stay in 16 bits",
            )
        case "w8a16":
            return Support("native", "Marlin", read)
        case "w8a8":
            return Support("native", "Cutlass", read)
    return Support("refused", f"no kernel for {scheme.kind}", read)


def _vllm_cpu(scheme: Scheme) -> Support:
    match scheme.kind:
        case "w2a16" | "w3a16":
            return Support(
                "refused", "Failed to find a kernel that can implement the WNA16 linear layer", "run (0.32.0)"
            )
        case "w4a16":
            return Support(
                "native",
                "x86 with AVX-512; without it cpu_gemm_wna16 is missing",
                "run (0.32.0)",
                "avx512f",
                "computes in bfloat16",
                "bfloat16",
            )
        case "w4a8":
            differs = "activations stay in 16 bits"
            return Support("weight only", "x86 with AVX-512, as W4A16", "run (0.32.0)", "avx512f", differs, "bfloat16")
        case "w8a8":
            differs = "the largest activation of a token becomes 127, in transformers 127.5"
            return Support("native", "", "run (0.32.0)", differs=differs)
    return Support("refused", f"no kernel for {scheme.kind}", "vLLM 0.33.0")


def _sglang(scheme: Scheme) -> Support:
    read = "SGLang 0.5.23, compressed_tensors"
    match scheme.kind:
        case "w4a16" | "w8a16":
            return Support("native", "Marlin (sm80 and newer)", read)
        case "w8a8":
            return Support("native", "Cutlass", read)
    return Support("refused", f"no scheme for {scheme.kind}", read)


def _transformers(scheme: Scheme) -> Support:
    note = "needs compressed-tensors 0.18: older ones pack 3 bits otherwise" if scheme.weight_bits == 3 else ""
    return Support("dequantized", note, "run (5.23, compressed-tensors 0.20)")


def _llama_cpp(scheme: Scheme) -> Support:
    source = "run (2026.10)"
    try:
        block = gguf_block(scheme)
    except ValueError as error:
        return Support("refused", str(error).split(";")[0], source)
    differs = "rounds activations to 8 bits in blocks of 32"
    if scheme.activation_bits is not None:
        differs += ", not one scale per token"
    return Support("native", f"{block} blocks", source, differs=differs)


def _mlx(scheme: Scheme) -> Support:
    source = "run (0.32)"
    try:
        mlx_group(scheme, MLX_GROUPS[0])
    except ValueError as error:
        return Support("refused", str(error).split(";")[0], source)
    if scheme.activation_bits is None:
        return Support("native", "activations in float32", source)
    return Support("weight only", "activations in float32", source, differs="activations stay in 32 bits")


_VLLM_SERVE = "vllm serve {folder}"
_LLAMA_SERVER = "llama-server --model {folder}-gguf/model.gguf --mmproj {folder}-gguf/mmproj.gguf"
_MLX_GENERATE = 'python -m mlx_vlm.generate --model {folder}-mlx --image picture.png --prompt "What is written here?"'

_SCALED = FamilyNote(
    differs="multiplies logits by logit_scale, which transformers omits in this family: other probabilities, in the "
    "same order"
)
#: vLLM normalizes pixels in its towers, but the tower of EXAONE 4.5 lacks that module (exaone4_5.py of 0.32.0).
_UNNORMALIZED = FamilyNote(
    differs="0.32 normalizes the pixels of this family with `--no-mm-device-do-normalize` only",
    flag="--no-mm-device-do-normalize",
)
_VLLM_NOTES = {
    "aya_vision": _SCALED,
    "cohere2_vision": _SCALED,
    "exaone4_5": _UNNORMALIZED,
    "ernie4_5_vl_moe": FamilyNote(
        "reads the config of the publisher's own code: that of transformers has other fields"
    ),
    "llava_next_video": FamilyNote(differs="takes videos of this family, but no images"),
    **dict.fromkeys(
        ("ovis2", "got_ocr2", "deepseek_vl", "deepseek_ocr2", "idefics2"),
        FamilyNote(differs="takes text of this family, but no images"),
    ),
}
_CAUSAL = FamilyNote(differs="tokens of an image attend to earlier ones alone, in the model to all of the image")
_VLLM_CPU_NOTES = {
    **_VLLM_NOTES,
    **dict.fromkeys(("gemma3", "gemma4"), _CAUSAL),
    "lfm2_vl": FamilyNote("its kernel of rotary embeddings rotates the heads of this family wrongly"),
    "molmo2": FamilyNote("transformers 5.19, with which 0.32 was run, has no model type molmo2"),
}

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vLLM, NVIDIA", "0.33", CHECKPOINT, _vllm, _VLLM_SERVE, notes=_VLLM_NOTES),
        Engine(
            "vllm-cpu", "vLLM, CPU", "0.32", CHECKPOINT, _vllm_cpu, _VLLM_SERVE, experts=False, notes=_VLLM_CPU_NOTES
        ),
        Engine(
            "sglang", "SGLang, NVIDIA", "0.5.23", CHECKPOINT, _sglang, "python -m sglang.launch_server --model {folder}"
        ),
        Engine("transformers", "transformers", "5.23", CHECKPOINT, _transformers, experts=False, joined=False),
        Engine("llama.cpp", "llama.cpp", "2026.10", "gguf", _llama_cpp, _LLAMA_SERVER, GGUF_FAMILIES),
        Engine("mlx", "MLX", "0.32", "mlx", _mlx, _MLX_GENERATE, MLX_FAMILIES),
    )
}


def get_engine(name: str) -> Engine:
    """The engine called ``name``. Raises ValueError if there is none."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def check_engine(name: str, scheme: Scheme, architecture: Architecture | None = None) -> Support:
    """What the engine called ``name`` does with a scheme.

    Args:
        architecture: of the model, if it is known: some engines do not run quantized experts, or linears that a
            checkpoint keeps in one tensor.

    Raises:
        ValueError: there is no such engine, or it refuses the scheme; the message names the nearest that it runs.
    """
    engine = get_engine(name)
    special = engine.notes.get(architecture.model_type, FamilyNote()) if architecture is not None else FamilyNote()
    if special.refused:
        raise ValueError(
            f"{engine.title} {engine.version} does not run this family ({special.refused}); choose another engine"
        )
    joined = architecture is not None and architecture.joined
    if joined and not engine.joined:
        raise ValueError(
            f"{engine.title} {engine.version} does not load quantized linears that a checkpoint keeps in one tensor; "
            "choose another engine"
        )
    if joined and scheme.overrides:
        raise ValueError(
            f"{engine.title} {engine.version} finds no override for linears that a checkpoint keeps in one tensor; "
            "remove the overrides, or name no engine and load the result with tlq.load_model"
        )
    if architecture is not None and architecture.experts is not None and not engine.experts:
        able = [each.name for each in ENGINES.values() if each.experts and each.container == CHECKPOINT]
        raise ValueError(
            f"{engine.title} {engine.version} does not run quantized experts; choose one of {', '.join(able)}"
        )
    found = engine.of(scheme)
    if found.runs == "refused":
        raise ValueError(
            f"{engine.title} {engine.version} does not run {scheme.name} ({found.note}); the nearest scheme that it "
            f"runs is {nearest(engine, scheme).name}"
        )
    return found


def mixed_by(name: str | None) -> tuple[str, ...]:
    """The schemes that a budget may be distributed to if the engine called ``name`` is to run them; None for any."""
    if name is None:
        return MIXED
    engine = get_engine(name)
    return tuple(each for each in MIXED if each == FULL_PRECISION or engine.of(get_scheme(each)).runs != "refused")


def nearest(engine: Engine, scheme: Scheme) -> Scheme:
    """The scheme that an engine runs whose weights, then activations, have the nearest number of bits."""

    def distance(other: Scheme) -> tuple[int, int, bool]:
        activations = abs((other.activation_bits or 16) - (scheme.activation_bits or 16))
        return abs(other.weight_bits - scheme.weight_bits), activations, other.symmetric != scheme.symmetric

    return min((each for each in SCHEMES.values() if engine.of(each).runs != "refused"), key=distance)


def parts_of(scheme: Scheme) -> Iterator[Scheme]:
    """The schemes of which a checkpoint consists, each without overrides; for a budget, all candidates."""
    if scheme.budget is not None:
        yield from (get_scheme(name) for name in MIXED if name != FULL_PRECISION)
    else:
        yield replace(scheme, overrides=())
    yield from (get_scheme(name) for _, name in scheme.overrides if name != FULL_PRECISION)


def table(schemes: list[Scheme], family: str | None = None, experts: bool = False) -> str:
    """What every engine does with the schemes, or with a checkpoint of a family, as a table of markdown."""
    lines = ["| scheme | engine | container | runs | how | source |", "|---|---|---|---|---|---|"]
    for scheme in schemes:
        for engine in ENGINES.values():
            found = engine.of(scheme) if family is None else engine.of_checkpoint(scheme, family, experts)
            engine_cells = (f"{engine.title} {engine.version}", engine.container)
            lines.append(f"| {' | '.join((scheme.name, *engine_cells, found.runs, found.how, found.source))} |")
    return "\n".join(lines) + "\n"


def families() -> str:
    """The supported families as lines of text: ``model_type``, what loads an export, targets of ``tlq convert``."""
    lines = [f"{'family':<18}{'loaded by':<30}tlq convert --to"]
    for name in FAMILIES:
        decoder = DECODERS.get(f"{name}_text")
        loader = "tlq.load_model" if FAMILIES[name].joined else "transformers"
        if decoder is not None and decoder.experts is not None:
            loader = "transformers (dense models)" if decoder.experts.optional else "tlq.load_model"
        targets = [to for to, known in (("gguf", GGUF_FAMILIES), ("mlx", MLX_FAMILIES)) if name in known]
        lines.append(f"{name:<18}{loader:<30}{' '.join(targets)}".rstrip())
    return "\n".join(lines) + "\n"


def serving(scheme: Scheme, family: str, folder: str, experts: bool = False) -> str:
    """How engines serve a checkpoint, for its card: a table of markdown, and the commands.

    Args:
        family: ``model_type`` of the checkpoint's config.json.
        folder: the checkpoint's folder, as the commands name it.
        experts: whether it has a mixture of experts.
    """
    lines = ["| engine | runs | how |", "|---|---|---|"]
    commands = []
    for engine in ENGINES.values():
        found = engine.of_checkpoint(scheme, family, experts)
        lines.append(f"| {engine.title} {engine.version} | {found.runs} | {found.how} |")
        if found.runs == "refused" or not engine.command:
            continue
        if engine.container != CHECKPOINT:
            commands.append(f"tlq convert {folder} --to {engine.container} --out {folder}-{engine.container}")
        commands.append(engine.served(folder, family))
    return "\n".join([*lines, "", "```bash", *dict.fromkeys(commands), "```"])
