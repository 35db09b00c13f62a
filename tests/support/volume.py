"""Stand-in for a Databricks Volume: a folder that refuses, in all processes of a test, what a Volume refuses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

COMPILER = shutil.which("gcc")


class Volume(NamedTuple):
    """A folder that acts as a Volume for each process that has the variables `environment`, and a list of refused
    calls.
    """

    folder: Path
    refusals: Path
    library: Path

    @classmethod
    def build(cls, folder: Path, build: Path) -> Volume:
        """Compile the library into the folder `build`, and create the Volume `folder`."""
        assert COMPILER is not None
        library = build / "volume.so"
        source = Path(__file__).with_name("volume.c")
        build.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, "-o", str(library), str(source), "-ldl"], check=True)
        return cls(folder.resolve(), build / "refusals.txt", library)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make the folder act as a Volume for a process and its children."""
        return {
            "LD_PRELOAD": str(self.library),
            "VOLUME_FOLDER": str(self.folder),
            "VOLUME_REFUSALS": str(self.refusals),
        }

    def refused(self) -> list[str]:
        """Return the refused calls, each as the name of the call, a space and the path."""
        return self.refusals.read_text(encoding="utf-8").splitlines() if self.refusals.exists() else []
