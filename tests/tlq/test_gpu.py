"""On a GPU: the same results as on the host, and the same bits in every run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tlq import quantize
from tlq.export.loading import load_model
from tlq.importance.gradients import score_tokens
from tlq.importance.losses import AnswerLoss, BlockLoss, Loss
from tlq.importance.token_set import TokenBudget
from tlq.models.processor import load_processor
from tlq.models.streaming import StreamedModel
from tlq.quantization import kernels
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.objective import Factor, Statistics, Tokens
from tlq.quantization.rounding import round_compensated
from tlq.recipes import RECIPES
from tlq.runtime.digest import checkpoint_digest
from tlq.samples import Batch, Sample, encode_batches, image_token_id

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def problem(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [256, 256], x and u [1024, 256], w [1024]: drawn on the host, the same numbers anywhere."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator) / 16
    x = torch.randn(1024, 256, generator=generator) * torch.rand(256, generator=generator).exp()
    u = x + 0.1 * torch.randn(x.shape, generator=generator)
    w = torch.rand(1024, generator=generator)
    return tuple(tensor.to(device) for tensor in (weight, x, u, w))  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["statistics", "tokens"])
def test_errors_are_those_of_the_host(form: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        weight, x, u, w = problem(device)
        quantized = WeightQuantizer(get_scheme("w3a16"), torch.bfloat16).fake_quantize(weight)
        if form == "statistics":
            found += Statistics.of(weight, x, u, w).errors([(slice(None), quantized - weight)]).tolist()
        else:
            found += Tokens([x @ weight.T], u, w).errors([0], quantized).tolist()
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_compensated_rounding_gives_the_codes_of_the_host(scheme: str) -> None:
    codes = []
    for device in ("cpu", "cuda"):
        weight, _, u, w = problem(device)
        factor = Factor.of((u * w[:, None]).T @ u)
        assert factor is not None
        (rounded,) = round_compensated([weight], factor, WeightQuantizer(get_scheme(scheme), torch.bfloat16))
        codes.append(rounded.codes.cpu())
    # A value in the middle between two codes falls to either side, and what follows makes up for it.
    assert float((codes[0] != codes[1]).float().mean()) < 0.01


def test_codes_do_not_depend_on_other_targets() -> None:
    weight, _, u, w = problem("cuda")
    factor = Factor.of((u * w[:, None]).T @ u)
    assert factor is not None
    scheme, parts = get_scheme("w3a16"), weight.split(64)
    together = round_compensated(parts, factor, WeightQuantizer(scheme, torch.bfloat16))
    for part, beside in zip(parts, together, strict=True):
        (alone,) = round_compensated([part], factor, WeightQuantizer(scheme, torch.bfloat16))
        assert torch.equal(alone.codes, beside.codes)


@pytest.fixture
def quantized(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> Callable[..., Path]:
    """The tiny checkpoint quantized; returns the folder."""

    def run(name: str, recipe: str, scheme: str, device: str, dtype: str = "float32") -> Path:
        budget = TokenBudget(300)
        out = tmp_path / name
        quantize(tiny_checkpoint, out, samples, recipe, scheme, budget=budget, batch_size=3, dtype=dtype, device=device)
        return out

    return run


def errors(folder: Path) -> Tensor:
    """Error of every group after rounding."""
    report = json.loads((folder / "calibration.json").read_text())
    return torch.tensor([group["error_after"] for group in report["groups"]])


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "rtn"])
def test_every_recipe_has_the_same_errors_on_gpu_and_host(
    quantized: Callable[..., Path], recipe: str, scheme: str
) -> None:
    """Last bits differ and change some codes through error feedback: single errors differ, their mean does not."""
    host, gpu = (quantized(device, recipe, scheme, device) for device in ("cpu", "cuda"))
    ratios = (errors(gpu) / errors(host)).log()
    assert float(ratios.abs().max()) < math.log(1.5)
    assert float(ratios.mean().abs()) < 0.1


@pytest.mark.parametrize("rows", [256, 250])
@pytest.mark.parametrize("scheme", ["w2a16", "w3a16s", "w4a8"])
def test_the_kernel_rounds_to_the_bits_of_the_eager_loop(
    scheme: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.available(torch.device("cuda"))
    weight, _, u, w = problem("cuda")
    factor, _ = Statistics.of(weight, u, u, w).factor(0.01)
    weight = weight[:rows]
    quantizer = WeightQuantizer(get_scheme(scheme), torch.bfloat16)
    (fast,) = round_compensated([weight], factor, quantizer)
    monkeypatch.setattr(kernels, "available", lambda device: False)
    (eager,) = round_compensated([weight], factor, quantizer)
    assert torch.equal(fast.codes, eager.codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["mbq", "tlq-c"])
def test_two_gpu_runs_are_bit_identical(quantized: Callable[..., Path], recipe: str, dtype: str) -> None:
    folders = [quantized(f"run-{number}", recipe, "w3a16", "cuda", dtype) for number in range(2)]
    for folder in folders:
        (folder / "calibration.json").unlink()  # it tells times
    assert checkpoint_digest(folders[0]) == checkpoint_digest(folders[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [AnswerLoss(), BlockLoss(get_scheme("w3a16"), torch.bfloat16)])
def test_importance_is_bit_identical_in_every_run(
    tiny_checkpoint: Path, samples: list[Sample], dtype: torch.dtype, loss: Loss
) -> None:
    model = StreamedModel(tiny_checkpoint, dtype, "cuda")
    batches: list[Batch] = encode_batches(
        samples, load_processor(tiny_checkpoint), image_token_id(model.config), batch_size=4, max_tokens=512
    )
    first, second = (score_tokens(model, batches, loss) for _ in range(2))
    assert all((first[key] == second[key]).all() for key in first)


def test_a_checkpoint_made_on_a_gpu_generates_there(quantized: Callable[..., Path]) -> None:
    folder = quantized("out", "tlq-c", "w3a16", "cuda", "bfloat16")
    model = load_model(folder, torch.bfloat16, device="cuda")
    prompt = torch.tensor([[65, 66, 67]], device="cuda")
    assert model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False).shape[1] > 3  # type: ignore[operator]
