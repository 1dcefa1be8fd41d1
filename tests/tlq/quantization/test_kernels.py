"""The Triton kernel of compensated rounding: interpreted, it gives the eager loop's bits; it compiles for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from tlq.quantization import kernels

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

INTERPRETED = """
import torch
from tlq.quantization import kernels, rounding
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.objective import Factor

assert kernels.available(torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
u = torch.randn(300, 256, generator=generator) * torch.rand(256, generator=generator).exp()
factor = Factor.of(u.T @ u / 300 + 0.01 * torch.eye(256))
targets = [torch.randn(270, 256, generator=generator) for _ in range(2)]
for scheme in ("w2a16", "w3a16", "w3a16s", "w4a8"):
    quantizer = WeightQuantizer(get_scheme(scheme), torch.bfloat16)
    calls, kernel = [], kernels.round_strip
    found = []
    for used in (True, False):
        kernels.available = lambda device, used=used: used
        kernels.round_strip = lambda *arguments: (calls.append(1), kernel(*arguments))
        found.append(rounding.round_compensated(targets, factor, quantizer))
        kernels.round_strip = kernel
    assert len(calls) == 256 // 16, calls
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.zero_point, other.zero_point)
    print(scheme, len(found[0]))
"""


def test_interpreted_it_gives_the_bits_of_the_eager_loop() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["w2a16", "2", "w3a16", "2", "w3a16s", "2", "w4a8", "2"]


def test_it_is_chosen_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_launches", lambda device: True)
    assert kernels.available(torch.device("cuda", 0))
    assert not kernels.available(torch.device("cpu"))


def test_without_a_compiler_rounding_stays_eager(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "round_strip", fail)
    kernels._launches.cache_clear()
    try:
        assert not kernels._launches(torch.device("cpu"))
    finally:
        kernels._launches.cache_clear()
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_fused_multiply_add(capability: int) -> None:
    """A fused multiply-add rounds once where the eager loop rounds twice: codes would differ."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    tensors, constants = ("block", "original", "upper", "codes", "errors"), {"COLUMNS": 16, "ROWS": 256}
    names = kernels._kernel.__annotations__.keys() - {"return"}
    signature = {
        name: "*fp32" if name in tensors else "constexpr" if name in constants else "i32"
        for name in kernels._kernel.__code__.co_varnames[: len(names)]
    }
    source = ASTSource(fn=kernels._round_strip, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    code = compile_kernel(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert not re.search(r"fma\.rn\.f32", code)
    # Every earlier column of a strip, for the two values of a thread.
    assert len(re.findall(r"mul(?:\.rn)?\.f32", code)) == 2 * sum(range(16))
