"""Tests that a row that crashes or hangs a process costs no other row, and that time limits stop endless code."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Callable

import pytest

from pipelines.errors import UserError
from pipelines.executor import crash_guard
from pipelines.executor.crash_guard import Death, run_guarded
from pipelines.executor.time_limit import TimeLimitExceeded, time_limit

SECONDS = 0.1


def crash() -> None:
    ctypes.string_at(0)


def loop_in_c() -> None:
    """Loop for ever in C code, which no signal handler of Python can interrupt."""
    deque(itertools.repeat(0), maxlen=0)


def loop_in_python() -> None:
    while True:
        pass


def end_of_memory() -> None:
    raise MemoryError


FAULTS: dict[int, Callable[[], None]] = {
    3: crash,
    5: loop_in_c,
    8: end_of_memory,
    9: lambda: os._exit(3),
    12: loop_in_python,
}


def double(number: int) -> str:
    try:
        with time_limit(SECONDS):
            FAULTS.get(number, lambda: None)()
    except TimeLimitExceeded:
        return "interrupted"
    return str(2 * number)


def describe(number: int, death: Death) -> str:
    return f"{number} {death.how} {death.timed_out}"


def test_only_the_result_of_one_item_is_lost_if_this_item_ends_its_child_process() -> None:
    started = time.monotonic()
    results = list(run_guarded(range(13), double, describe))
    faults = {
        3: "3 was ended by SIGSEGV False",
        5: "5 took too long True",
        8: "8 ran out of memory False",
        9: "9 ended with exit code 3 False",
        12: "interrupted",
    }
    assert results == [faults.get(number, str(2 * number)) for number in range(13)]
    assert time.monotonic() - started < 20


def test_only_the_last_item_is_lost_if_the_last_or_the_only_item_crashes_its_child_process() -> None:
    assert list(run_guarded([1, 3], double, describe)) == ["2", "3 was ended by SIGSEGV False"]
    assert list(run_guarded([3], double, describe)) == ["3 was ended by SIGSEGV False"]
    assert list(run_guarded([], double, describe)) == []


def test_an_error_of_the_guarded_function_is_raised_and_ends_the_child_process() -> None:
    def refuse(number: int) -> int:
        if number == 1:
            raise UserError("no", where="here")
        return number

    results = run_guarded([0, 1, 2], refuse, lambda *_: -1)
    assert next(results) == 0
    with pytest.raises(UserError, match="Where: here"):
        next(results)


def test_a_child_process_is_ended_if_its_results_are_no_longer_read() -> None:
    def wait(number: int) -> int:
        time.sleep(60 * number)
        return os.getpid()

    results = run_guarded([0, 1], wait, lambda *_: -1)
    child = next(results)
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_large_results_are_received_completely_from_a_child_process() -> None:
    assert [len(result) for result in run_guarded([1, 2], lambda n: bytes(n * 2**22), lambda *_: b"")] == [2**22, 2**23]


def test_no_timer_keeps_running_after_the_guarded_code_has_ended() -> None:
    with time_limit(60):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 60
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def sleep_for_ever(number: int) -> str:
    """Use no processor time and ignore both timers of a time limit, as a child that waits for a lock does."""
    with time_limit(SECONDS):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        while number == 1:
            time.sleep(600)
    return str(number)


def test_a_child_that_waits_for_ever_without_using_processor_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_guard, "RESULT_SECONDS", 1.0)
    assert list(run_guarded(range(3), sleep_for_ever, describe)) == ["0", "1 took too long True", "2"]
