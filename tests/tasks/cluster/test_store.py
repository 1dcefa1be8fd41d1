"""The messages between a stage, its agents and their ranks."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from prefect.client.schemas.objects import StateType
from torch.distributed import TCPStore

from flows.pool import pool_worker
from tasks.cluster import store as store_module
from tasks.cluster.authenticated import keep_secret, new_secret, read_secret
from tasks.cluster.clock import WrongClockError, check_clock
from tasks.cluster.store import JobStore, StageGoneError

SECRET = new_secret()


def stranger(stage: JobStore) -> TCPStore:
    """A connection as any process can open one, without the secret."""
    host, port = stage.endpoint.rsplit(":", 1)
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False)


@pytest.mark.parametrize("value", ["1", "", "x" * 100, b"\x80\x04."])
def test_a_value_without_the_jobs_signature_does_not_count(value: str | bytes) -> None:
    stage = JobStore.host("127.0.0.1", SECRET, "job-1")
    for key in ("failure", "finished", "begun", "stopped", "job", "lines/1"):
        stranger(stage).set(f"tlq/{key}", value)  # type: ignore[arg-type]
    rank = JobStore.join(stage.endpoint, SECRET)
    for store in (stage, rank):
        assert (store.failure(), store.finished(), store.begun(), store.stopped("a")) == (None, False, False, False)
        assert store.lines() == []
    assert rank.job() is None
    assert stage.job() == "job-1"  # what the stage wrote itself it restores
    assert rank.fail("model.path: not found")
    assert stage.failure() == "model.path: not found"


def test_a_signed_value_counts_only_under_its_key() -> None:
    stage = JobStore.host("127.0.0.1", SECRET)
    stage.begin()
    other = stranger(stage)
    other.set("tlq/finished", other.get("tlq/begun"))  # type: ignore[arg-type]
    assert not stage.finished()


def test_a_store_of_another_job_has_no_messages() -> None:
    stage = JobStore.host("127.0.0.1", SECRET, "job-1")
    stage.finish()
    other = JobStore.join(stage.endpoint, new_secret())
    assert other.job() is None
    assert not other.finished()


def test_a_secret_is_readable_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / ".tlq" / "job.secret"
    for secret in (new_secret(), SECRET):
        keep_secret(secret, file)
    assert read_secret(file) == SECRET
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_store_listens_on_the_address_it_was_given_and_no_other() -> None:
    store = JobStore.host("127.0.0.1", SECRET)
    port = int(store.endpoint.rsplit(":", 1)[1])
    listening = [link.laddr.ip for link in psutil.Process().net_connections() if link.laddr.port == port]
    assert set(listening) == {"127.0.0.1"}


def test_an_address_of_another_machine_is_refused_by_name() -> None:
    with pytest.raises(OSError, match=r"TLQ_HOST is '192\.0\.2\.1', no address of this machine"):
        JobStore.host("192.0.2.1", SECRET)


def test_the_first_reported_failure_is_kept() -> None:
    stage = JobStore.host("127.0.0.1", SECRET, "job-1")
    rank, other = JobStore.join(stage.endpoint, SECRET), JobStore.join(stage.endpoint, SECRET)
    assert rank.job() == "job-1"
    assert stage.failure() is None
    assert rank.fail("model.path: not found")
    assert not other.fail("something else")
    assert stage.failure() == other.failure() == "model.path: not found"


def test_lines_reach_the_stage_once_and_in_order() -> None:
    stage = JobStore.host("127.0.0.1", SECRET)
    agents = [JobStore.join(stage.endpoint, SECRET) for _ in range(2)]
    for number in range(4):
        agents[number % 2].send_line(f"line {number}")
    assert stage.lines() == [f"line {number}" for number in range(4)]
    assert stage.lines() == []
    agents[0].send_line("ü")
    assert stage.lines() == ["ü"]


def test_one_agent_or_all_are_stopped() -> None:
    stage = JobStore.host("127.0.0.1", SECRET)
    agent = JobStore.join(stage.endpoint, SECRET)
    agent.heartbeat("a")
    assert (stage.heartbeats("a"), stage.heartbeats("b")) == (1, 0)
    stage.stop("a")
    assert (agent.stopped("a"), agent.stopped("b")) == (True, False)
    stage.stop()
    assert agent.stopped("b")


@pytest.mark.parametrize("ahead", [0.0, 3000.0, -3000.0])
def test_a_machine_with_a_wrong_clock_is_told_so(ahead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that is already there when an agent joins may be old and does not count."""
    stage = JobStore.host("127.0.0.1", SECRET)
    agent = JobStore.join(stage.endpoint, SECRET)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 500)
    stage.show_clock()
    monkeypatch.undo()

    def of_the_stage(now: Callable[[], float] = time.time) -> float:
        return now() - (ahead if threading.current_thread().name == "stage" else 0)

    monkeypatch.setattr(time, "time", of_the_stage)
    later = threading.Timer(0.3, stage.show_clock)
    later.name = "stage"
    later.start()
    try:
        if ahead:
            side = "ahead of" if ahead > 0 else "behind"
            with pytest.raises(WrongClockError, match=rf"(30|29)\d\d s {side} that of the stage"):
                check_clock(agent, "a")
        else:
            check_clock(agent, "a")
    finally:
        later.join()


def test_an_agent_whose_stage_shows_no_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = JobStore.host("127.0.0.1", SECRET)
    monkeypatch.setattr(store_module, "ANSWER_SECONDS", 1)
    with pytest.raises(StageGoneError, match="shows no time"):
        JobStore.join(stage.endpoint, SECRET, seconds=5).clock_ahead("a")


@pytest.mark.parametrize("ends", ["finish", "stop"])
def test_a_worker_that_is_no_longer_needed_waits_for_no_clock(ends: str) -> None:
    stage = JobStore.host("127.0.0.1", SECRET)
    getattr(stage, ends)()
    assert JobStore.join(stage.endpoint, SECRET).clock_ahead("a") == 0


def test_the_clock_is_shown_while_the_host_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_SHOW_CLOCK_SECONDS", 0.05)
    stage = JobStore.host("127.0.0.1", SECRET)
    worker = JobStore.join(stage.endpoint, SECRET)
    with stage.shown_clock():
        check_clock(worker, "a")
        assert abs(worker.clock_ahead("a")) < 3
    assert not any(thread.name == "clock" for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [60, -60])
def test_a_worker_with_a_wrong_clock_ends_cancelled(
    ahead: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not count as a failed start, which is tried again; the stage's log says why it has ended."""
    keep_secret(SECRET, tmp_path / "secret")
    stage = JobStore.host("127.0.0.1", SECRET)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "a")
    monkeypatch.setattr(JobStore, "clock_ahead", lambda _self, _worker: ahead)
    state = pool_worker.fn(stage.endpoint, str(tmp_path / "secret"), 1, "json", [], str(tmp_path))
    assert state is not None
    assert state.type == StateType.CANCELLED
    assert "set both right (NTP)" in (state.message or "")
    assert stage.lines() == [state.message]


def test_an_agent_without_a_stage_ends_with_one_line(tmp_path: Path) -> None:
    """As a worker of a pool runs it."""
    secret = tmp_path / "secret"
    keep_secret(SECRET, secret)
    stage = JobStore.host("127.0.0.1", SECRET)
    endpoint = stage.endpoint
    del stage
    command = [sys.executable, "-m", "tasks.cluster.agent", "--store", endpoint, "--secret", str(secret)]
    agent = subprocess.Popen([*command, "--name", "a", "--agents", "1", "json"], stderr=subprocess.PIPE, text=True)
    try:
        _, said = agent.communicate(timeout=60)
    finally:
        agent.kill()
    assert agent.returncode == 1
    lines = [line for line in said.splitlines() if "the stage has ended" in line]
    assert len(lines) == 1, said
    assert "Traceback" not in said


def test_an_ended_stage_is_distinguished_from_a_silent_one() -> None:
    stage = JobStore.host("127.0.0.1", SECRET)
    agent = JobStore.join(stage.endpoint, SECRET)
    endpoint = stage.endpoint
    del stage
    with pytest.raises(StageGoneError, match="is gone"):
        agent.heartbeat("a")
    with pytest.raises(StageGoneError, match=f"no store answers at {endpoint}"):
        JobStore.join(endpoint, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as somebody_else, pytest.raises(StageGoneError):
        JobStore.join(f"127.0.0.1:{somebody_else.getsockname()[1]}", SECRET, seconds=1)
