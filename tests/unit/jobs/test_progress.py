"""Tests of the progress that commands show: a bar with the time left, or a line every few seconds."""

from __future__ import annotations

import io
import logging
import threading
import time

import pytest

from jobs import progress


def test_a_progress_line_is_printed_regularly_without_a_terminal_even_if_progress_cannot_be_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    monkeypatch.setattr(progress, "sys", type("sys", (), {"stderr": io.StringIO()}))
    with caplog.at_level(logging.INFO), progress.show_elapsed("evaluate"):
        deadline = time.monotonic() + 60
        while len(caplog.records) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 3
    assert all(line.startswith("evaluate 0:00 elapsed") for line in lines[:3])


def test_a_progress_bar_on_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, drawn = Terminal(), threading.Event()

    def poll() -> tuple[int, str]:
        if "30/120" in terminal.getvalue():
            drawn.set()
        return 30, "train/loss 0.5"

    monkeypatch.setattr(progress, "BAR_AFTER", 0)
    monkeypatch.setattr(progress, "sys", type("sys", (), {"stderr": terminal}))
    with progress.show_progress("train", poll, 120):
        assert drawn.wait(60)
    assert "30/120" in terminal.getvalue()
    assert " left" in terminal.getvalue()


@pytest.mark.parametrize(
    ("count", "total", "elapsed", "initial", "text", "line"),
    [
        (0, None, 9.6, 0, "", "0:10 elapsed"),
        (0, 400, 10, 0, "", "0/400, 0:10 elapsed"),
        (100, 400, 30, 0, "train/loss 0.4", "100/400, 0:30 elapsed, 1:30 left  train/loss 0.4"),
        (300, 400, 30, 200, "", "300/400, 0:30 elapsed, 0:30 left"),
        (1000, 100_000, 3700, 0, "", "1,000/100,000, 1:01:40 elapsed, 101:45:00 left"),
        (401, 400, 30, 0, "", "401/400, 0:30 elapsed, 0:00 left"),
    ],
)
def test_the_progress_line_shows_the_elapsed_time_and_the_time_left(
    count: int, total: int | None, elapsed: float, initial: int, text: str, line: str
) -> None:
    assert progress.progress_text(count, total, elapsed, initial, text) == line
