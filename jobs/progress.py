"""Progress of a wait on stderr: a bar on a terminal, a log line now and then otherwise."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TextIO

from pipelines.background import in_background
from pipelines.formats.run_folder import RunFolder

log = logging.getLogger(__name__)

BAR_AFTER = 2.0
"""Seconds that may pass before a bar appears."""
LINE_EVERY = 10.0
"""Seconds between log lines."""

Poll = Callable[[], tuple[int, str]]
"""Returns how far things are, and a few words on how they go."""


def progress(label: str, poll: Poll, total: int | None = None) -> AbstractContextManager[None]:
    """Show that something is going on for as long as the block runs.

    Args:
        label: what is going on.
        poll: called now and then, from another thread.
        total: what `poll` counts up to; None shows the time alone.
    """
    shown = partial(_bar, stream=stream) if (stream := sys.stderr).isatty() else _lines
    return in_background(partial(shown, label, poll, total), f"progress {label}")


def waiting(label: str) -> AbstractContextManager[None]:
    """`progress` of something that cannot be counted."""
    return progress(label, lambda: (0, ""))


def training_poll(run: RunFolder) -> Poll:
    """Reads how far a training run is from the metric files of its run folder."""
    last = -1
    text = ""

    def poll() -> tuple[int, str]:
        nonlocal last, text
        for metrics in run.read_metrics(after=last):
            last = metrics.step
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.values.items() if name in SHOWN)
        return max(last, 0), text

    return poll


SHOWN = ("train/loss", "train/samples_per_second")


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
