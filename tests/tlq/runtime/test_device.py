"""Devices and dtypes by name: unknown and absent ones are named with the next step."""

from __future__ import annotations

import pytest
import torch

from tlq.api import CalibrationOptions
from tlq.runtime.device import check_dtype, device_named


def test_a_device_that_this_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("cuda:1", "TLQ_DEVICE") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="TLQ_DEVICE is cuda:2, this machine has 2 usable GPUs; use cpu, or check"):
        device_named("cuda:2", "TLQ_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, this machine has 0 usable GPUs"):
        device_named("cuda", "device")
    with pytest.raises(ValueError, match="device: 'gpu' is no device; use cpu, cuda or cuda:0"):
        device_named("gpu", "device")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", torch.bfloat16])
def test_dtypes_of_computation_are_accepted(dtype: str | torch.dtype) -> None:
    check_dtype(dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype 'bf16': choose one of auto, float32, bfloat16, float16"),
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**options)  # type: ignore[arg-type]
