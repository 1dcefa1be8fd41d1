"""A stage on ranks: the command that they run, and one line for an agent whose ranks fail for good."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tasks.cluster import launch
from tasks.cluster.authenticated import new_secret
from tasks.cluster.rank import RankCommand
from tasks.command import run


def test_ranks_that_fail_too_often_end_the_stage_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: Any) -> None:
        raise ChildFailedError("tlq", {0: ProcessFailure(0, 1, -signal.SIGKILL, "error.json")})

    monkeypatch.setattr(launch, "elastic_launch", lambda *_arguments: fail)
    monkeypatch.setenv("TLQ_RESTARTS", "2")
    for name in (launch.STORE, launch.SECRET, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")  # so that they are as before when the test ends
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")
    with pytest.raises(SystemExit) as ended:
        run(lambda: launch.run_agent("127.0.0.1:1", new_secret(), RankCommand("tasks.stages.calibrate"), 2))
    assert ended.value.code == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("the ranks failed 3 times, the last with exit status -9; finished work is kept")


def test_ranks_run_shared_work_with_its_arguments_as_options(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[RankCommand, int]] = []
    monkeypatch.setattr(launch, "_launch_local", lambda command, ranks: started.append((command, ranks)))
    done: list[tuple[str, str]] = []

    @launch.shared_by_ranks("tasks.stages.calibrate", most=4)
    def quantize(recipe: str, scheme: str) -> None:
        done.append((recipe, scheme))

    monkeypatch.setenv("TLQ_RANKS", "1")
    quantize("tlq", "w3a16")
    assert (done, started) == ([("tlq", "w3a16")], [])
    monkeypatch.setenv("TLQ_RANKS", "9")
    quantize("tlq", scheme="w3a16")
    command = RankCommand("tasks.stages.calibrate", ("--recipe", "tlq", "--scheme", "w3a16"))
    assert (len(done), started) == (1, [(command, 4)])
