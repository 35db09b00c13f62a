"""Progress of a long step on stderr: a bar on a terminal, otherwise a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TextIO

from pipelines.background_thread import in_background
from pipelines.formats.run_folder import RunFolder

log = logging.getLogger(__name__)

BAR_AFTER = 2.0
"""Seconds from the start of a step until its progress bar appears."""
LINE_EVERY = 10.0
"""Seconds between two progress lines in the log."""

Poll = Callable[[], tuple[int, str]]
"""Function that returns how much of a step is done (a count) and a short status text."""


def show_progress(label: str, poll: Poll, total: int | None = None) -> AbstractContextManager[None]:
    """Show the progress of a step while the `with` block runs.

    Args:
        label: name of the step.
        poll: function that returns the current progress; a background thread calls this function repeatedly.
        total: count at which the step is complete; None to show only the elapsed time.
    """
    shown = partial(_bar, stream=stream) if (stream := sys.stderr).isatty() else _lines
    return in_background(partial(shown, label, poll, total), f"progress {label}")


def show_elapsed(label: str) -> AbstractContextManager[None]:
    """Show the elapsed time of a step, whose progress cannot be counted, while the `with` block runs."""
    return show_progress(label, lambda: (0, ""))


def poll_training(run: RunFolder) -> Poll:
    """Return a poll function that reads the current step and metrics of a training run from the run folder."""
    last = -1
    text = ""

    def poll() -> tuple[int, str]:
        nonlocal last, text
        for metrics in run.read_metrics(after=last):
            last = metrics.step
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.values.items() if name in SHOWN_METRICS)
        return max(last, 0), text

    return poll


SHOWN_METRICS = ("train/loss", "train/samples_per_second")


def _bar(label: str, poll: Poll, total: int | None, stop: threading.Event, stream: TextIO) -> None:
    from tqdm import tqdm

    started = time.time()
    if stop.wait(BAR_AFTER):
        return
    form = (
        "{desc} {elapsed}" if total is None else "{desc} {percentage:3.0f}% |{bar:24}| {n}/{total} {elapsed}{postfix}"
    )
    with tqdm(desc=label, total=total, bar_format=form, leave=False, file=stream) as bar:
        bar.start_t = started
        while not stop.wait(0.5):
            bar.n, text = poll()
            bar.set_postfix_str(text)


def _lines(label: str, poll: Poll, total: int | None, stop: threading.Event) -> None:
    shown = 0
    while not stop.wait(LINE_EVERY):
        count, text = poll()
        if count != shown:
            shown = count
            log.info("%s %d/%s  %s", label, count, total, text)
