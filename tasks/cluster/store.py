"""The messages between a stage, its agents and their ranks, on the store where the agents meet.

The stage's own process hosts the store. When the process ends the store ends too, and agents and ranks notice it. The
messages are signed with a secret that only the job's processes have, see ``AuthenticatedStore``.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore

from tasks.cluster.authenticated import AuthenticatedStore

logger = logging.getLogger("tlq.pool")

T = TypeVar("T")

#: Seconds within which a running store answers.
ANSWER_SECONDS = 20

_CLOCK_POLL_SECONDS = 0.1
_SHOW_CLOCK_SECONDS = 1.0

_FAILURE, _FINISHED, _BEGUN, _STOPPED, _JOB, _LINES, _CLOCK = (
    f"tlq/{name}" for name in ("failure", "finished", "begun", "stopped", "job", "lines", "clock")
)


class StageGoneError(ConnectionError):
    """The store does not answer: the process that hosts it has ended, or its machine cannot be reached."""


class JobStore:
    """The messages of one job.

    Attributes:
        signed: the store itself, on which the agents also form their group.
        endpoint: host and port under which the store is reached.
    """

    def __init__(self, store: AuthenticatedStore, endpoint: str) -> None:
        self.signed = store
        self.endpoint = endpoint
        self._lines_read = 0

    @classmethod
    def host(cls, address: str, secret: str, job: str = "") -> JobStore:
        """Host a store in this process that listens on ``address`` only.

        Args:
            secret: signs the messages, see ``new_secret``.
            job: name of the job.

        Raises:
            OSError: ``address`` is not an address of this machine.
        """
        try:
            family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((address, 0), family=family)
        except OSError as error:
            raise OSError(
                f"TLQ_HOST is {address!r}, no address of this machine ({error}); set it to one that the workers reach"
            ) from error
        port = listener.getsockname()[1]
        # Without a socket of ours the store would listen on every interface. The store closes the socket.
        store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
        hosted = cls(AuthenticatedStore(store, secret), f"{address}:{port}")
        hosted._set(_JOB, job)
        return hosted

    @classmethod
    def join(cls, endpoint: str, secret: str, seconds: float = ANSWER_SECONDS) -> JobStore:
        """Connect to the store that another process hosts.

        Raises:
            StageGoneError: no store answers at ``endpoint`` within ``seconds``.
        """
        return cls(AuthenticatedStore(_connected(endpoint, seconds), secret), endpoint)

    def _request(self, request: Callable[[], T]) -> T:
        try:
            return _in_time(request, ANSWER_SECONDS)
        except (TimeoutError, RuntimeError) as error:
            raise StageGoneError(f"the stage is gone: {self.endpoint} does not answer") from error

    def _set(self, key: str, value: str = "1") -> None:
        """Set a key and wait until the store has it: the check follows on the same connection."""
        self._request(lambda: self.signed.set(key, value))
        self._read(key)

    def _read(self, key: str) -> str | None:
        value = self._request(lambda: self.signed.read(key))
        return None if value is None else value.decode()

    def _has(self, key: str) -> bool:
        return self._read(key) is not None

    def job(self) -> str | None:
        """The name that the host gave to the job; None if the store is of a job with another secret."""
        return self._read(_JOB)

    def fail(self, message: str) -> bool:
        """Report a failure that a retry cannot cure; False if another one was reported before."""
        return self._request(lambda: self.signed.compare_set(_FAILURE, "", message)).decode() == message

    def raise_failure(self) -> None:
        """Raise ValueError with the message that a rank reported, if one did."""
        if (message := self.failure()) is not None:
            raise ValueError(message)

    def failure(self) -> str | None:
        """The message that ``fail`` reported, if any."""
        return self._read(_FAILURE)

    def finish(self) -> None:
        """Mark the job's result as complete."""
        self._set(_FINISHED)

    def finished(self) -> bool:
        return self._has(_FINISHED)

    def begin(self) -> None:
        """Let the agents that have joined form a group."""
        self._set(_BEGUN)

    def begun(self) -> bool:
        return self._has(_BEGUN)

    def stop(self, agent: str = "") -> None:
        """Ask an agent to end, or all of them."""
        self._set(_STOPPED + agent)

    def stopped(self, agent: str) -> bool:
        """Whether ``agent``, or every agent, is to end."""
        return self._has(_STOPPED) or self._has(_STOPPED + agent)

    def show_clock(self) -> None:
        """Let the workers read this machine's clock."""
        now = str(time.time())
        self._request(lambda: self.signed.set(_CLOCK, now))

    @contextmanager
    def shown_clock(self) -> Iterator[None]:
        """Show this machine's clock every second, in a thread: the host may be busy with other things for longer."""
        leaving = threading.Event()

        def show() -> None:
            try:
                while not leaving.wait(_SHOW_CLOCK_SECONDS):
                    self.show_clock()
            except StageGoneError as error:
                logger.warning("the clock is no longer shown to new workers: %s", error)

        self.show_clock()
        thread = threading.Thread(target=show, daemon=True, name="clock")
        thread.start()
        try:
            yield
        finally:
            leaving.set()
            thread.join()

    def clock_ahead(self, worker: str) -> float:
        """Seconds by which this machine's clock is ahead of the host's, to about the interval of ``shown_clock``.

        Returns 0 if the job no longer needs ``worker``, since the host may then show no time.

        Raises:
            StageGoneError: the host shows no time within ``ANSWER_SECONDS``.
        """
        until, first = time.monotonic() + ANSWER_SECONDS, self._read(_CLOCK)
        while (shown := self._read(_CLOCK)) in (None, first):  # the first one may be old
            if self.finished() or self.stopped(worker):
                return 0.0
            if time.monotonic() > until:
                raise StageGoneError(f"the stage is gone: {self.endpoint} answers but shows no time")
            time.sleep(_CLOCK_POLL_SECONDS)
        assert shown is not None
        return time.time() - float(shown)

    def heartbeat(self, agent: str) -> None:
        """Send a heartbeat."""
        self._request(lambda: self.signed.add(f"tlq/heartbeats/{agent}", 1))

    def heartbeats(self, agent: str) -> int:
        """The number of heartbeats of ``agent``."""
        return self.signed.add(f"tlq/heartbeats/{agent}", 0)

    def send_line(self, line: str) -> None:
        """Send a line to the stage's log."""
        index = self._request(lambda: self.signed.add(_LINES, 1))
        self._set(f"{_LINES}/{index}", line)

    def lines(self) -> list[str]:
        """The lines sent since the last call; each is returned once."""
        lines = []
        while (line := self.signed.read(key := f"{_LINES}/{self._lines_read + 1}")) is not None:
            lines.append(line.decode())
            self.signed.delete_key(key)
            self._lines_read += 1
        return lines


def group_store(endpoint: str, secret: str, group: str, seconds: float) -> AuthenticatedStore:
    """The store in which the ranks of one group find each other.

    Args:
        group: name of the group; it differs each time that a group forms.
        seconds: how long a rank waits for another one.

    Raises:
        StageGoneError: no store answers at ``endpoint``.
    """
    return AuthenticatedStore(_connected(endpoint, ANSWER_SECONDS, seconds), secret, f"tlq/groups/{group}/")


def _connected(endpoint: str, seconds: float, wait: float | None = None) -> TCPStore:
    """A connection to the store at ``endpoint`` that waits ``wait`` seconds for a value, by default ``seconds``."""
    host, port = endpoint.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), seconds).close()  # fails at once; the store would retry
        limit = timedelta(seconds=seconds)
        store = _in_time(lambda: TCPStore(host, int(port), wait_for_workers=False, timeout=limit), seconds)
    except (OSError, RuntimeError) as error:
        raise StageGoneError(f"no store answers at {endpoint}: the stage has ended") from error
    if wait is not None:
        store.set_timeout(timedelta(seconds=wait))
    return store


def _in_time(request: Callable[[], T], seconds: float) -> T:
    """The result of a request that may block forever, for instance if the store's machine has lost power.

    Raises:
        TimeoutError: there is no result after ``seconds``; the waiting thread stays.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(request())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True, name="request to the store").start()
    return answer.result(seconds)
