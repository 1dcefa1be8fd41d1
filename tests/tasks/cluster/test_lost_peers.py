"""Which errors of a collective mean that another rank is gone."""

from __future__ import annotations

import pytest
from torch.distributed import DistBackendError, DistNetworkError

from tasks.cluster.launch import _is_lost_peer


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:8093."), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"), True),
        (RuntimeError("[gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find interface for: eth7"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError(""), False),
        (DistNetworkError("The client socket has timed out"), True),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (DistBackendError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"), False),
    ],
)
def test_an_error_of_a_connection_is_a_lost_peer(error: RuntimeError, lost: bool) -> None:
    assert _is_lost_peer(error) is lost
