"""The limit on the time of work."""

from __future__ import annotations

import signal
import threading
import time

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


def test_another_thread_has_no_limit() -> None:
    ended: list[bool] = []

    def work() -> None:
        with time_limit(0.01, "the work"):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
