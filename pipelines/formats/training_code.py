"""Description of the code that trains a run, as stored in run.json."""

from __future__ import annotations

from vlm.config import Config


class TrainingCode(Config):
    """Version of the code with which ranks train a run.

    Attributes:
        release: release of Lakesight, such as '0.2.0'.
        digest: hash of the paths and hashes in `files`.
        files: hash of each Python file of the packages `vlm` and `pipelines.worker`, by path in the project.
        commit: git commit, with ` (changed)` if files differ from the commit; empty if the code is not in git.
    """

    release: str
    digest: str
    files: dict[str, str]
    commit: str = ""

    def different_files(self, other: TrainingCode) -> list[str]:
        """Return the sorted paths of the files that differ between two versions of the training code."""
        return sorted({name for name, _ in self.files.items() ^ other.files.items()})
