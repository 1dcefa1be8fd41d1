"""Agents form their group on the signed store: what a stranger writes is neither unpickled nor believed."""

from __future__ import annotations

import base64
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from support.listeners import listeners
from support.ranked_job import assert_equal, finish, processes_of, start, write_job
from support.waiting import eventually
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

from tasks.cluster.authenticated import new_secret
from tasks.cluster.rendezvous import BACKEND, GROUP, SECRET, create
from tasks.cluster.store import JobStore

STATE = "torch.rendezvous.tlq"


class Poison:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def poison(endpoint: str, mark: Path) -> None:
    host, port = endpoint.rsplit(":", 1)
    state = base64.b64encode(pickle.dumps(Poison(mark)))
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
    store.set(STATE, state.decode())


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> JobStore:
    secret = new_secret()
    for name, value in {SECRET: secret, GROUP: "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}.items():
        monkeypatch.setenv(name, value)
    return JobStore.host("127.0.0.1", secret)


def agent(stage: JobStore) -> RendezvousHandler:
    return create(RendezvousParameters(BACKEND, stage.endpoint, "tlq", 1, 2, local_addr="127.0.0.1"))


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_poisoned_state_is_not_unpickled_and_a_group_forms(stage: JobStore, tmp_path: Path, moment: str) -> None:
    mark = tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Poison(mark)))
    assert mark.exists()  # the poison works
    mark.unlink()
    if moment == "before":
        poison(stage.endpoint, mark)
    agents = [agent(stage), agent(stage)]
    if moment == "between":
        poison(stage.endpoint, mark)
    with ThreadPoolExecutor() as threads:
        joined = list(threads.map(lambda each: each.next_rendezvous(), agents))
    assert sorted(each.rank for each in joined) == [0, 1]
    assert not mark.exists()
    for each in agents:
        each.shutdown()


def test_every_group_has_another_number(stage: JobStore) -> None:
    numbers = []
    for _ in range(2):
        handler = agent(stage)
        handler.next_rendezvous()
        numbers.append(os.environ[GROUP])
    assert numbers == ["1", "2"]


@pytest.mark.soak
def test_ranks_under_attack_give_the_same_bits_and_listen_on_loopback_only(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    process = start(job, "attacked", "mbq", "w3a16", {"TLQ_RANKS": "2"})
    mark = tmp_path / "unpickled"
    eventually(lambda: len(processes_of(job / "attacked")) == 3, 120)
    stage = psutil.Process(process.pid)
    (port,) = {link.laddr.port for link in stage.net_connections() if link.status == psutil.CONN_LISTEN}
    heard: set[str] = set()
    while process.poll() is None:
        with suppress(RuntimeError):  # the stage may just have ended
            poison(f"127.0.0.1:{port}", mark)
        heard |= listeners(processes_of(job / "attacked"))
        time.sleep(0.1)
    undisturbed = start(job, "alone", "mbq", "w3a16", {})
    assert_equal(finish(process, job / "attacked"), finish(undisturbed, job / "alone"))
    assert not mark.exists()
    assert heard == {"127.0.0.1"}
