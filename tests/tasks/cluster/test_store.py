"""The messages between a stage, its agents and their ranks."""

from __future__ import annotations

import socket

import psutil
import pytest

from tasks.cluster.store import JobStore, StageGoneError


def test_the_store_listens_on_the_address_it_was_given_and_no_other() -> None:
    store = JobStore.host("127.0.0.1")
    port = int(store.endpoint.rsplit(":", 1)[1])
    listening = [link.laddr.ip for link in psutil.Process().net_connections() if link.laddr.port == port]
    assert set(listening) == {"127.0.0.1"}


def test_an_address_of_another_machine_is_refused_by_name() -> None:
    with pytest.raises(OSError, match=r"TLQ_HOST is '192\.0\.2\.1', no address of this machine"):
        JobStore.host("192.0.2.1")


def test_the_first_reported_failure_is_kept() -> None:
    stage = JobStore.host("127.0.0.1", "job-1")
    rank, other = JobStore.join(stage.endpoint), JobStore.join(stage.endpoint)
    assert rank.job() == "job-1"
    assert stage.failure() is None
    assert rank.fail("model.path: not found")
    assert not other.fail("something else")
    assert stage.failure() == other.failure() == "model.path: not found"


def test_lines_reach_the_stage_once_and_in_order() -> None:
    stage = JobStore.host("127.0.0.1")
    agents = [JobStore.join(stage.endpoint) for _ in range(2)]
    for number in range(4):
        agents[number % 2].send_line(f"line {number}")
    assert stage.lines() == [f"line {number}" for number in range(4)]
    assert stage.lines() == []
    agents[0].send_line("ü")
    assert stage.lines() == ["ü"]


def test_one_agent_or_all_are_stopped() -> None:
    stage = JobStore.host("127.0.0.1")
    agent = JobStore.join(stage.endpoint)
    agent.heartbeat("a")
    assert (stage.heartbeats("a"), stage.heartbeats("b")) == (1, 0)
    stage.stop("a")
    assert (agent.stopped("a"), agent.stopped("b")) == (True, False)
    stage.stop()
    assert agent.stopped("b")


def test_an_ended_stage_is_distinguished_from_a_silent_one() -> None:
    stage = JobStore.host("127.0.0.1")
    agent = JobStore.join(stage.endpoint)
    endpoint = stage.endpoint
    del stage
    with pytest.raises(StageGoneError, match="is gone"):
        agent.heartbeat("a")
    with pytest.raises(StageGoneError, match=f"no store answers at {endpoint}"):
        JobStore.join(endpoint)
    with socket.create_server(("127.0.0.1", 0)) as somebody_else, pytest.raises(StageGoneError):
        JobStore.join(f"127.0.0.1:{somebody_else.getsockname()[1]}", seconds=1)
