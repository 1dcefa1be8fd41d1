"""The limit on the time of work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tlq.runtime.limit import EndlessError, time_limit


def test_work_that_ends_in_time_is_not_disturbed() -> None:
    with time_limit(0.05, "the work"):
        pass
    time.sleep(0.1)  # the timer is off


def work_without_end() -> None:
    with time_limit(0.05, "the work"):
        while True:
            pass


def test_work_that_does_not_end_is_stopped_by_name() -> None:
    with pytest.raises(EndlessError, match="the work has not finished after 0.05 seconds"):
        work_without_end()


def test_an_earlier_timer_goes_on() -> None:
    fired: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _frame: fired.append(number))
    earlier = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with time_limit(10, "the work"):
            time.sleep(0.01)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.2
        with time_limit(10, "the work"):
            time.sleep(0.25)
        time.sleep(0.05)
        assert fired == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *earlier)


def in_thread(work: Callable[[], None]) -> BaseException | None:
    """What ``work`` raises in a thread other than the main one."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_work_of_another_thread_is_stopped_by_name() -> None:
    error = in_thread(work_without_end)
    assert isinstance(error, EndlessError)
    assert str(error) == "the work has not finished after 0.05 seconds"


def test_another_thread_is_not_disturbed_after_its_work() -> None:
    def work() -> None:
        for seconds in (0.001, 0.05, 5):
            with suppress(EndlessError), time_limit(seconds, "the work"):
                time.sleep(0.002)  # one call of compiled code, beyond the first limit
            until = time.monotonic() + 0.1
            while time.monotonic() < until:
                pass

    assert in_thread(work) is None


def test_the_inner_of_two_limits_of_another_thread_names_its_work() -> None:
    def work() -> None:
        with time_limit(5, "the whole"):
            work_without_end()

    assert str(in_thread(work)) == "the work has not finished after 0.05 seconds"
