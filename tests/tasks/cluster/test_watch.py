"""The watch over worker runs, with a pool that does what the test says instead of a server."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelled, Crashed, Running, Scheduled

from tasks.cluster import watch
from tasks.cluster.authenticated import new_secret
from tasks.cluster.rank import RankCommand
from tasks.cluster.store import JobStore
from tasks.cluster.watch import Watch
from tasks.cluster.work_pool import Job, NoWorkerError

SECRET = new_secret()
JOB = Job(RankCommand("tasks.stages.calibrate", ("tlq",)), Path("/project"))


@dataclass
class FakePool:
    """Runs begin as ``begins`` says and keep the states that the watch or the test sets."""

    begins: Callable[[int], State] = lambda _number: Running()
    name: str = "gpu"
    states: dict[uuid.UUID, State] = field(default_factory=dict)
    busy_workers: int = 0

    def submit(self, _job: Job, _name: str, _endpoint: str, _agents: int) -> Any:
        run = uuid.uuid4()
        self.states[run] = self.begins(len(self.states))
        return SimpleNamespace(id=run)

    def runs(self, ids: Sequence[uuid.UUID]) -> list[Any]:
        return [SimpleNamespace(id=run, state=self.states[run], state_type=self.states[run].type) for run in ids]

    def set_state(self, run: uuid.UUID, state: State, force: bool = False) -> None:
        self.states[run] = state

    def busy(self) -> int:
        return self.busy_workers

    def online(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watch, "_END_SECONDS", 0.1)


def watching(pool: FakePool, store: JobStore, count: int = 2) -> Watch:
    watched = Watch(pool, JOB, store)  # type: ignore[arg-type]
    watched.submit(count)
    return watched


def test_an_error_of_a_rank_ends_the_stage_and_its_runs() -> None:
    pool, store = FakePool(), JobStore.host("127.0.0.1", SECRET)
    watched = watching(pool, store)
    store.fail("unknown scheme 'w9'")
    with pytest.raises(ValueError, match="unknown scheme 'w9'"):
        watched.until_finished()
    watched.end()
    assert store.stopped("any")
    assert {state.type for state in pool.states.values()} == {StateType.CANCELLED}


def test_a_lost_run_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    store = JobStore.host("127.0.0.1", SECRET)

    def begins(number: int) -> State:
        if number == 3:  # the replacement of the last lost run
            store.finish()
        return Crashed(message="out of memory") if number < 2 else Running()

    pool = FakePool(begins)
    watching(pool, store).until_finished()
    assert len(pool.states) == 4
    assert caplog.text.count("is lost (CRASHED: out of memory); another one is submitted") == 2


def test_runs_that_never_begin_end_the_stage() -> None:
    pool = FakePool(lambda _number: Crashed(message="no module named tlq"))
    with pytest.raises(ChildProcessError, match="5 worker runs in a row ended before they began.*no module named tlq"):
        watching(pool, JobStore.host("127.0.0.1", SECRET)).until_finished()


def test_more_lost_runs_than_allowed_end_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLQ_RESTARTS", "2")
    pool = FakePool(lambda _number: Crashed(message="killed"))
    with pytest.raises(ChildProcessError, match="3 worker runs were lost, more than TLQ_RESTARTS = 2"):
        watching(pool, JobStore.host("127.0.0.1", SECRET)).until_finished()


def test_a_silent_run_is_set_to_crashed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLQ_POOL_SILENCE", "1")
    monkeypatch.setattr("tasks.cluster.work_pool._START_FACTOR", 0.1)
    store = JobStore.host("127.0.0.1", SECRET)

    def begins(number: int) -> State:
        if number:
            store.finish()
        return Running()

    pool = FakePool(begins)
    watching(pool, store, 1).until_finished()
    assert [state.type for state in pool.states.values()] == [StateType.CRASHED, StateType.RUNNING]


def test_runs_cancelled_by_a_user_are_not_replaced() -> None:
    pool = FakePool(lambda _number: Cancelled(message="the clock of a is 60 s behind"))
    with pytest.raises(ChildProcessError, match="its runs on pool gpu were cancelled: the clock of a is 60 s behind$"):
        watching(pool, JobStore.host("127.0.0.1", SECRET)).until_finished()


def test_the_stage_continues_without_a_cancelled_run(caplog: pytest.LogCaptureFixture) -> None:
    """For example that of a worker with a wrong clock, to which each further run would go too."""
    store = JobStore.host("127.0.0.1", SECRET)
    pool = FakePool(lambda number: Running() if number else Cancelled(message="the clock of a is 60 s behind"))
    watched = watching(pool, store, 2)
    threading.Timer(0.3, store.finish).start()
    watched.until_finished()
    assert len(pool.states) == 2
    assert "was cancelled (the clock of a is 60 s behind); the others continue without it" in caplog.text


def test_a_stage_waits_while_workers_are_busy_but_not_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLQ_POOL_WAIT", "1")
    pool, store = FakePool(lambda _number: Scheduled()), JobStore.host("127.0.0.1", SECRET)
    with pytest.raises(NoWorkerError, match="no worker took up a run within 1 s; found 0 online"):
        watching(pool, store).until_finished()
