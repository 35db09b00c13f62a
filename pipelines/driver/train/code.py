"""Identity of the code that trains: a hash of the sources that ranks import, and the git commit where there is one.

Pages, jobs and docs are not part of the identity, so a corrected help text starts no training again.
"""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pipelines
import vlm
from pipelines.config import short_hash
from pipelines.formats.training_code import TrainingCode
from vlm.files import file_digest

GIT_SECONDS = 10.0


def read_code() -> TrainingCode:
    """Describe the installed code."""
    roots = {"vlm": Path(vlm.__path__[0]), "pipelines/worker": Path(pipelines.__path__[0]) / "worker"}
    files = {
        f"{name}/{path.relative_to(root).as_posix()}": file_digest(path)[:16]
        for name, root in roots.items()
        for path in sorted(root.rglob("*.py"))
    }
    return TrainingCode(
        release=version("lakesight"), digest=short_hash(files), files=files, commit=_git_commit(Path(vlm.__path__[0]))
    )


def _git_commit(folder: Path) -> str:
    """Return the commit of a git checkout, with ` (changed)` if tracked files differ from it.

    Return an empty string if the code is not tracked by git, for example because it was installed as a wheel.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= (changed)"]
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"]
    try:
        for words in (tracked, command):
            done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)  # noqa: S603
            if done.returncode:
                return ""
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
