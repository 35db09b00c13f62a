"""Clock that a test shifts for commands and all of their child processes (Linux with gcc)."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from pipelines.background_thread import in_background

COMPILER = shutil.which("gcc")


class ShiftedClock(NamedTuple):
    """Library that shifts the clock of each process that has the variables `environment`."""

    library: Path

    @classmethod
    def build(cls, folder: Path) -> ShiftedClock:
        """Compile the library into a new folder. At first, the clock is not shifted."""
        assert COMPILER is not None
        folder.mkdir()
        clock = cls(folder / "shifted_clock.so")
        clock._seconds.write_bytes(bytes(8))
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(clock.library)]
        subprocess.run([*command, str(Path(__file__).with_suffix(".c")), "-ldl"], check=True)
        return clock

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that shift the clock of a process and its children."""
        return {"LD_PRELOAD": str(self.library)}

    def shift(self, seconds: int) -> None:
        """Set the difference to the real time, in seconds. Running processes see the new time immediately."""
        with self._seconds.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

    @contextmanager
    def jumping(self, shifts: Sequence[int], every: float) -> Iterator[None]:
        """While the block runs, set the next difference in `shifts` every `every` seconds; after the block, set 0.

        After the last difference in `shifts`, the first difference follows again.
        """

        def jump(ended: threading.Event) -> None:
            for seconds in cycle(shifts):
                self.shift(seconds)
                if ended.wait(every):
                    return

        with in_background(jump, "clock"):
            yield
        self.shift(0)

    @property
    def _seconds(self) -> Path:
        return self.library.with_name(f"{self.library.name}.seconds")
