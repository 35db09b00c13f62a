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
from pipelines.config import TrainConfig
from pipelines.formats.run_files.new_files import new_metrics
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
        total: count at which the step is complete, or None to show only the elapsed time.

    Without a terminal, a line is logged every LINE_EVERY seconds, even if nothing was done since the last line.
    """
    shown = partial(_bar, stream=stream) if (stream := sys.stderr).isatty() else _lines
    return in_background(partial(shown, label, poll, total), f"progress {label}")


def show_elapsed(label: str) -> AbstractContextManager[None]:
    """Show the elapsed time of a step, whose progress cannot be counted, while the `with` block runs."""
    return show_progress(label, lambda: (0, ""))


def poll_training(run: RunFolder, settings: TrainConfig) -> Poll:
    """Return a poll function that reads the current step and metrics of a training run from the run folder."""
    last = run.last_checkpoint_step() - 1
    text = ""

    def poll() -> tuple[int, str]:
        nonlocal last, text
        for metrics in new_metrics(run, settings, last):
            last = metrics.step
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.values.items() if name in SHOWN_METRICS)
        return max(last, 0), text

    return poll


SHOWN_METRICS = ("train/loss", "train/cider", "train/samples_per_second")


def _bar(label: str, poll: Poll, total: int | None, stop: threading.Event, stream: TextIO) -> None:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    started = time.time()
    if stop.wait(BAR_AFTER):
        return
    form = "{desc} {elapsed}"
    if total is not None:
        form = "{desc} {percentage:3.0f}% |{bar:24}| {n}/{total} {elapsed}, {remaining} left{postfix}"
    with logging_redirect_tqdm(), tqdm(desc=label, total=total, bar_format=form, leave=False, file=stream) as bar:
        bar.start_t = started
        bar.initial, _ = poll()  # work done before a resume does not count in the speed
        while not stop.wait(0.5):
            bar.n, text = poll()
            bar.set_postfix_str(text)


def _lines(label: str, poll: Poll, total: int | None, stop: threading.Event) -> None:
    started = time.monotonic()
    initial, _ = poll()
    while not stop.wait(LINE_EVERY):
        count, text = poll()
        elapsed = time.monotonic() - started
        log.info("%s %s", label, progress_text(count, total, elapsed, initial, text))


def progress_text(count: int, total: int | None, elapsed: float, initial: int, text: str) -> str:
    """Describe progress in one line, for example `120/400, 0:30 elapsed, 1:10 left  train/loss 0.43`.

    Args:
        count: how much of the step is done.
        total: count at which the step is complete, or None if the progress cannot be counted.
        elapsed: seconds since the start.
        initial: count at the start; above 0 if the step was resumed.
        text: status text.
    """
    parts = [f"{_clock(elapsed)} elapsed"]
    if total is not None:
        parts.insert(0, f"{count:,}/{total:,}")
        if count > initial:
            parts.append(f"{_clock(elapsed * max(0, total - count) / (count - initial))} left")
    return "  ".join(part for part in (", ".join(parts), text) if part)


def _clock(seconds: float) -> str:
    """Format a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
