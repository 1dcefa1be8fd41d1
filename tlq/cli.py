"""The command ``tlq``: quantize a checkpoint, plan the job, convert the result, list the supported model families.

Torch is imported in the functions that need it, so that help is printed at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlq.runtime.log import log_level

if TYPE_CHECKING:
    from tlq.samples import Sample

RECIPES = ("rtn", "smoothquant", "awq", "gptq", "mbq", "tlq", "tlq-c")
SCHEMES = (
    *("w2a16", "w2a16s", "w3a16", "w3a16s", "w4a16", "w4a16s", "w8a16s", "w4a8", "w8a8"),
    *("q4_0", "q4_1", "q8_0"),
)
CONTAINERS = ("gguf", "mlx", "int8")
ENGINES = ("vllm", "vllm-cpu", "sglang", "transformers", "llama.cpp", "mlx")

logger = logging.getLogger("tlq")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 after an expected error, 130 after Ctrl-C.

    Wrong arguments exit with status 2. ``TLQ_LOG=debug`` logs more, including tracebacks of expected errors.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stderr)
    try:
        logger.setLevel(log_level())
        arguments.run(arguments)
    except (ValueError, OSError, MemoryError, FloatingPointError, ImportError) as error:
        logger.debug("traceback", exc_info=True)
        sys.stderr.write(f"tlq: error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("tlq: interrupted; run the same command again to continue\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tlq", description="Quantize vision-language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="quantize a checkpoint", description=_quantize.__doc__)
    _add_job(quantize)
    quantize.add_argument("--out", type=Path, required=True, help="folder for the quantized checkpoint")
    quantize.set_defaults(run=_quantize)

    plan = commands.add_parser("plan", help="print what a job will need", description=_plan.__doc__)
    _add_job(plan)
    plan.set_defaults(run=_plan)

    convert = commands.add_parser(
        "convert", help="carry a quantized checkpoint over to another engine", description=_convert.__doc__
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that `tlq quantize` wrote")
    convert.add_argument(
        "--to", required=True, choices=CONTAINERS, help="gguf for llama.cpp, mlx for Apple devices, int8 for Arm CPUs"
    )
    convert.add_argument("--out", type=Path, required=True, help="folder for the result")
    convert.set_defaults(run=_convert)

    dequantize = commands.add_parser(
        "dequantize", help="write a checkpoint of FP8 weights in bfloat16", description=_dequantize.__doc__
    )
    dequantize.add_argument("model", metavar="MODEL", help="checkpoint directory or Hugging Face hub id")
    dequantize.add_argument("--out", type=Path, required=True, help="folder for the result")
    dequantize.set_defaults(run=_dequantize)

    engines = commands.add_parser("engines", help="print which engine runs what", description=_engines.__doc__)
    engines.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="folder of a quantized checkpoint"
    )
    engines.set_defaults(run=_engines)

    families = commands.add_parser("families", help="list the supported families", description=_families.__doc__)
    families.set_defaults(run=_families)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a job."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or Hugging Face hub id")
    parser.add_argument("--recipe", default="tlq-c", choices=RECIPES, help="method (default: %(default)s)")
    parser.add_argument(
        "--scheme",
        default="w4a16",
        type=_scheme,
        metavar="SCHEME",
        help=f"number format: {', '.join(SCHEMES)}; or a mix of them for a size, mix3.5 for 3.5 bits a weight, "
        "mix4.2gb for a checkpoint of 4.2 GB (default: %(default)s)",
    )
    parser.add_argument("--engine", choices=ENGINES, help="refuse a scheme that this engine does not run")
    parser.add_argument(
        "--data",
        type=Path,
        help="calibration samples: .json, .jsonl, .parquet or a folder of images; rtn needs none, except for a mix",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image names in --data are relative to")
    parser.add_argument("--samples", type=int, metavar="N", help="draw N samples of --data (default: all)")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="size of the token-level calibration set")
    parser.add_argument("--seed", type=int, default=0, help="seed of both draws (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples per micro-batch")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="longest sample allowed")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="dtype to compute in (default: float32 on a CPU, the checkpoint's on a GPU)"
    )


def _scheme(name: str) -> str:
    """The name of a scheme or of a mix. Raises argparse's error for another one."""
    from tlq.quantization.budget import Budget

    if name not in SCHEMES and Budget.of_name(name) is None:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no scheme; choose one of {', '.join(SCHEMES)}, or a mix such as mix3.5"
        )
    return name


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords for ``tlq.quantize`` and ``tlq.api.plan``."""
    from tlq import TokenBudget

    return {
        "recipe": arguments.recipe,
        "scheme": arguments.scheme,
        "budget": TokenBudget(arguments.tokens),
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "max_tokens": arguments.max_tokens,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "engine": arguments.engine,
    }


def _samples(arguments: argparse.Namespace) -> list[Sample]:
    from tlq import load_samples
    from tlq.quantization.formats import get_scheme
    from tlq.recipes import get_recipe

    scheme = get_scheme(arguments.scheme)
    if not get_recipe(arguments.recipe).needs_data(scheme) and scheme.budget is None:  # a budget is spent by loss
        return []
    if arguments.data is None:
        if scheme.budget is not None:
            raise ValueError(f"scheme {scheme.name} needs calibration samples to distribute its bits; give --data")
        raise ValueError(f"recipe {arguments.recipe} needs calibration samples; give --data, or choose --recipe rtn")
    return load_samples(arguments.data, arguments.images, arguments.samples, arguments.seed)


def _quantize(arguments: argparse.Namespace) -> None:
    """Quantize the decoder of MODEL and write a checkpoint; `tlq engines` says what loads it."""
    from tlq import quantize

    report = quantize(arguments.model, arguments.out, _samples(arguments), **_options(arguments))
    sys.stdout.write(f"{report.folder}\n")


def _plan(arguments: argparse.Namespace) -> None:
    """Print the memory, disk and time that a job will need on this machine, which is measured for some seconds."""
    from tlq.api import plan

    plans = plan(arguments.model, _samples(arguments), timed=True, **_options(arguments))
    sys.stdout.write("".join(f"{line}\n" for each in plans for line in each.lines()))


def _convert(arguments: argparse.Namespace) -> None:
    """Write a quantized checkpoint in the container of another engine, with exactly the same codes and scales."""
    from tlq.export.convert import convert

    for path in convert(arguments.checkpoint, arguments.to, arguments.out):
        sys.stdout.write(f"{path}\n")


def _dequantize(arguments: argparse.Namespace) -> None:
    """Write a checkpoint of FP8 weights in bfloat16, which `tlq quantize` and the pipeline take."""
    from tlq.export.dequantize import dequantize

    sys.stdout.write(f"{dequantize(arguments.model, arguments.out)}\n")


def _engines(arguments: argparse.Namespace) -> None:
    """Print which inference engine runs which scheme (or the number formats of CHECKPOINT), how, and the source."""
    from tlq.export.engines import table
    from tlq.export.quantized import schemes_of
    from tlq.models.architectures import architecture_of
    from tlq.models.checkpoint import load_config
    from tlq.quantization.formats import SCHEMES

    if arguments.checkpoint is None:
        sys.stdout.write(table(list(SCHEMES.values())))
        return
    schemes = schemes_of(arguments.checkpoint)
    try:
        architecture = architecture_of(load_config(arguments.checkpoint))
    except ValueError:  # another program quantized a family that has no row here
        sys.stdout.write(table(schemes))
        return
    sys.stdout.write(table(schemes, architecture.model_type, architecture.experts is not None))


def _families(arguments: argparse.Namespace) -> None:
    """List the supported model families, by the model_type of config.json, and what loads their exports."""
    from tlq.export.engines import families

    sys.stdout.write(families())
