"""Watch over the worker flow runs of a stage: submit them, replace lost ones, and end all of them with the stage."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed

from tasks.cluster.environment import positive, restarts_allowed
from tasks.cluster.store import JobStore
from tasks.cluster.work_pool import Job, Pool, WorkerRun, no_worker, wait_seconds

logger = logging.getLogger("tlq.pool")

T = TypeVar("T")

_POLL_SECONDS = 1.0
#: How long the first agents wait for the others before they begin.
_GATHER_SECONDS = 15.0
_END_SECONDS = 15.0
#: The stage fails after this many runs in a row ended without a heartbeat, because further runs would fail too.
_FAILED_STARTS = 5


class Watch:
    """The flow runs of one stage, from submission to their end."""

    def __init__(self, pool: Pool, job: Job, store: JobStore) -> None:
        self._pool = pool
        self._job = job
        self._store = store
        self._runs: list[WorkerRun] = []
        self._wanted = 0
        self._submitted = 0
        self._pending_restarts = 0
        self._lost = 0
        self._failed_starts = 0
        self._silence = positive("TLQ_POOL_SILENCE", 30)
        self._gathering: float | None = None
        self._deadline = time.monotonic() + wait_seconds()
        self._answers = True
        self._ending = False

    def submit(self, count: int) -> None:
        """Submit the first ``count`` runs."""
        self._wanted = count
        for _ in range(count):
            self._submit_one()

    def _submit_one(self) -> bool:
        self._submitted += 1
        name = f"{self._job.name} {self._submitted}"
        run = self._pool.submit(self._job, name, self._store.endpoint, self._wanted)
        self._runs.append(WorkerRun(run.id, name))
        return True

    @property
    def _unended(self) -> list[WorkerRun]:
        return [run for run in self._runs if not run.ended]

    def until_finished(self) -> None:
        """Watch until the result is complete.

        Raises:
            ValueError, NoWorkerError, ChildProcessError: see ``run_on_pool``.
        """
        while not self._store.finished():
            self._show_lines()
            self._store.raise_failure()
            self._refresh()
            self._replace_lost()
            self._let_begin()
            self._check_deadline()
            time.sleep(_POLL_SECONDS)

    def _show_lines(self) -> None:
        for line in self._store.lines():
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _refresh(self) -> None:
        """Read the runs' states from the server and their heartbeats from the store."""
        ids = [run.id for run in self._unended]
        nothing: list[FlowRun] = []
        flow_runs = {run.id: run for run in self._try(lambda: self._pool.runs(ids), nothing)}
        for run in self._unended:
            flow_run = flow_runs.get(run.id)
            state = flow_run.state_type if flow_run is not None and flow_run.state_type is not None else run.state
            heartbeats = self._store.heartbeats(str(run.id))
            if (state, heartbeats) != (run.state, run.heartbeats):
                run.state, run.heartbeats, run.changed = state, heartbeats, time.monotonic()
            if run.ended and flow_run is not None and flow_run.state is not None:
                run.message = flow_run.state.message or ""

    def _replace_lost(self) -> None:
        """Submit another run for every run that has ended too early or timed out."""
        self._crash_timed_out()
        lost = [run for run in self._runs if run.ended]
        self._runs = self._unended
        cancelled = [run for run in lost if run.state == StateType.CANCELLED]
        if cancelled and not self._runs and len(cancelled) == len(lost):
            reasons = "; ".join(sorted({run.message for run in cancelled if run.message}))
            raise ChildProcessError(
                f"{self._job.name}: its runs on pool {self._pool.name} were cancelled"
                + (f": {reasons}" if reasons else "")
            )
        for run in cancelled:
            logger.warning("worker run %s was cancelled (%s); the others continue without it", run.name, run.message)
        for run in lost:
            if run.state != StateType.CANCELLED:
                self._count_lost(run)
        while self._pending_restarts and self._try(self._submit_one, False):
            self._pending_restarts -= 1

    def _crash_timed_out(self) -> None:
        """Set runs without a recent heartbeat to Crashed.

        Their worker may have died too, so that no process reports their end. The automation of flows/pool.py is slower
        and also covers the runs whose stage has died.
        """
        for run in self._unended:
            if run.timed_out(self._silence):
                message = f"no heartbeat for {time.monotonic() - run.changed:.0f} s"
                self._store.stop(str(run.id))  # in case the run lives and only its connection was slow
                if self._set(run, Crashed(message=message), force=True):
                    run.state, run.message = StateType.CRASHED, message

    def _count_lost(self, run: WorkerRun) -> None:
        """Count a lost run and schedule its restart.

        Raises:
            ChildProcessError: too many runs were lost, or the last ``_FAILED_STARTS`` failed to start.
        """
        self._lost += 1
        self._pending_restarts += 1
        self._failed_starts = 0 if run.heartbeats else self._failed_starts + 1
        if self._failed_starts == _FAILED_STARTS:
            raise ChildProcessError(
                f"{self._job.name}: {_FAILED_STARTS} worker runs in a row ended before they began; the log of flow run "
                f"{run.name} on pool {self._pool.name} says why ({run.state.value}: {run.message})"
            )
        if self._lost > restarts_allowed():
            raise ChildProcessError(
                f"{self._job.name}: {self._lost} worker runs were lost, more than TLQ_RESTARTS = {restarts_allowed()}; "
                f"the last, {run.name}, ended {run.state.value}: {run.message}. Finished work is kept, run the same "
                "command again"
            )
        logger.warning(
            "worker run %s is lost (%s: %s); another one is submitted", run.name, run.state.value, run.message
        )

    def _let_begin(self) -> None:
        """Let the group form when all agents have joined, or ``_GATHER_SECONDS`` after the first one has."""
        joined = sum(run.works for run in self._runs)
        if self._store.begun() or not joined:
            return
        self._gathering = self._gathering or time.monotonic()
        if joined == self._wanted or time.monotonic() - self._gathering > _GATHER_SECONDS:
            logger.info("%s: %d of %d workers joined", self._job.name, joined, self._wanted)
            self._store.begin()

    def _check_deadline(self) -> None:
        """Raise NoWorkerError at the deadline; time in which the pool's workers are busy does not count."""
        if any(run.works for run in self._runs) or self._try(self._pool.busy, 1):
            self._deadline = time.monotonic() + wait_seconds()
        elif time.monotonic() > self._deadline:
            raise no_worker(self._pool, self._wanted)

    def _try(self, request: Callable[[], T], default: T) -> T:
        """The result of a request to the server, or ``default`` if it does not answer; the ranks do not need it.

        Once the stage is ending, a failed request is the last one, because the store also reports the end to the runs.
        """
        if self._ending and not self._answers:
            return default
        try:
            answer = request()
        except (httpx.HTTPError, OSError) as error:
            if self._answers:
                logger.warning("the Prefect server does not answer (%s); the ranks and the watch continue", error)
            self._answers = False
            return default
        self._answers = True
        return answer

    def end(self) -> None:
        """End all runs. The runs of a finished job end by themselves; otherwise the store asks them to stop.

        A run that does not stop is cancelled through the server, and finally its state is set to Cancelled by force.
        """
        self._ending = True
        if not self._store.finished():
            self._store.stop()
        for run in self._unended:
            if run.state == StateType.SCHEDULED:
                self._set(run, Cancelled(message="the stage has ended"))
        self._wait_for_end(_END_SECONDS)
        self._store.stop()
        for run in self._unended:
            self._set(run, Cancelling(message="the stage has ended"))
        self._wait_for_end(_END_SECONDS / 2)
        for run in self._unended:
            self._set(run, Cancelled(message="did not end when its stage did"), force=True)

    def _wait_for_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._refresh()
        while self._unended and time.monotonic() < deadline:
            self._crash_timed_out()
            time.sleep(_POLL_SECONDS / 2)
            self._show_lines()
            self._refresh()

    def _set(self, run: WorkerRun, state: State, force: bool = False) -> bool:
        """Set a run's state; returns whether the server received it."""

        def request() -> bool:
            try:
                self._pool.set_state(run.id, state, force)
            except ObjectNotFound:
                logger.warning("flow run %s has been deleted", run.name)
                run.state = StateType.CANCELLED
            return True

        return self._try(request, False)
