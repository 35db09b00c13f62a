"""Identity of the training code: a hash of the sources of `vlm` and `pipelines.worker`, and the git commit, if any.

Pages, jobs and docs are not part of the identity, so a finished run is not trained again after a change of a help
text.
"""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import vlm
from pipelines.executor.host_info import combine_hashes, hash_sources
from pipelines.formats.training_code import TrainingCode

GIT_SECONDS = 10.0


def read_code() -> TrainingCode:
    """Return the description of the installed training code."""
    files = hash_sources()
    return TrainingCode(
        release=version("lakesight"),
        digest=combine_hashes(files),
        files=files,
        commit=_git_commit(Path(vlm.__path__[0])),
    )


def _git_commit(folder: Path) -> str:
    """Return the commit of a git checkout, with ` (changed)` if tracked files differ from the commit.

    Return an empty string if git fails, or if the code is not tracked by git, for example in an installed wheel.
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
