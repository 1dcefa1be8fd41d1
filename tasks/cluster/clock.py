"""The check that a worker's clock agrees with that of the stage's machine."""

from __future__ import annotations

import socket

from tasks.cluster.store import JobStore

#: Agents compare times of their own clocks, and count one without a heartbeat for 8 seconds as dead.
_CLOCK_SECONDS = 3.0


class WrongClockError(RuntimeError):
    """The clock of this machine differs too much from that of the stage's machine."""


def check_clock(store: JobStore, worker: str) -> None:
    """Refuse to join with a wrong clock: the other agents would seem dead to this one, or this one to them.

    Raises:
        WrongClockError: the clock differs from the stage's by more than ``_CLOCK_SECONDS``.
        StageGoneError: the stage does not answer.
    """
    ahead = store.clock_ahead(worker)
    if abs(ahead) > _CLOCK_SECONDS:
        raise WrongClockError(
            f"the clock of {socket.gethostname()} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that "
            "of the stage's machine; set both right (NTP), then start this worker again"
        )
