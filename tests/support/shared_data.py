"""Data sets that are too large for the repository, in the folder ../shared/data next to the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "data"


def shared_file(name: str) -> Path:
    """Return the path of a shared file, or skip the test if this machine does not have the file."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} does not exist beside this checkout")
    return path
