"""Script that runs `lakesight` commands in one process, and reports which of the libraries in LARGE were imported and
how many Java processes each command started.

python traced_commands.py COMMANDS, where COMMANDS is a JSON list of command lines. The script prints a JSON list.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LARGE = {
    *("delta", "deltalake", "jinja2", "matplotlib", "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyspark"),
    *("sqlalchemy", "torch", "transformers"),
}
"""Libraries whose import takes longer than the rest of a short command."""


class Traced(NamedTuple):
    """What one command did.

    Attributes:
        printed: text that the command printed to stdout.
        imported: libraries of LARGE that the process had imported when the command ended.
        java: number of Java processes that the command started, including `java -version`.
        collections: number of times that Python searched for garbage while the command imported torch.
    """

    printed: str
    imported: set[str]
    java: int
    collections: int


def run_traced(home: Path, *commands: Sequence[str]) -> list[Traced]:
    """Run commands one after the other in one new process. Each command must succeed.

    The `imported` libraries of a command include the libraries that earlier commands of the process have imported.
    """
    from processes import TEST_PATH  # not at the top, because the import would count as an import of the commands

    log = home / "java.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"LAKESIGHT_HOME": str(home), "PYTHONPATH": TEST_PATH, "JAVA_HOME": str(counting_java(home, log))}
    done = subprocess.run(
        [sys.executable, "-P", __file__, json.dumps([log.as_posix(), *map(list, commands)])],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [Traced(printed, set(imported), java, collections) for printed, imported, java, collections in found]


def counting_java(home: Path, log: Path) -> Path:
    """Write a program `java` that adds a line to a log and then runs Java. Return the folder for JAVA_HOME."""
    program = home / "counted" / "bin" / "java"
    program.parent.mkdir(parents=True, exist_ok=True)
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if "JAVA_HOME" in os.environ else shutil.which("java")
    program.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec "{java}" "$@"\n')
    program.chmod(0o755)
    log.touch()
    return program.parents[1]


def main() -> None:
    """Run the commands of the first argument, and print what each command did."""
    import gc
    import io
    from contextlib import redirect_stdout

    from jobs.cli import app

    log, *commands = json.loads(sys.argv[1])
    found = []
    collections = []
    gc.callbacks.append(lambda phase, _: collections.append(phase) if _is_importing("torch") else None)
    for command in commands:
        collections.clear()
        before = len(Path(log).read_text().splitlines())
        with redirect_stdout(io.StringIO()) as printed:
            app(command, standalone_mode=False)
        java = len(Path(log).read_text().splitlines()) - before
        searches = collections.count("start")
        found.append([printed.getvalue(), sorted(LARGE & set(sys.modules)), java, searches])
    print(json.dumps(found))


def _is_importing(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


if __name__ == "__main__":
    main()
