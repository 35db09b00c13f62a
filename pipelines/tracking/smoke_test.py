"""Try a registered version as a stranger would: its own files, its own code, a fresh process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import Trial
from pipelines.platform import Platform
from pipelines.tracking.registry import ModelVersion, fetch

PROBE = Path(__file__).with_name("smoke_test_child.py")
TIMEOUT_SECONDS = 600
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How pickles begin, and the archives that torch.save makes of them."""
SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def try_version(platform: Platform, version: ModelVersion, pictures: Sequence[tuple[bytes, str]]) -> Trial:
    """Fetch a version anew, look for pickles among its files, load it in a fresh process and caption with it.

    The process reads a local folder and needs no access to the registry.

    Args:
        platform: where the registry is.
        version: to be tried.
        pictures: files and prompts.

    Raises:
        StageFailed: the registry does not deliver the version.
    """
    with tempfile.TemporaryDirectory() as folder:
        return try_folder(fetch(platform, version, Path(folder)), pictures)


def try_folder(folder: Path, pictures: Sequence[tuple[bytes, str]]) -> Trial:
    """`try_version` of a version whose files are here."""
    if pickles := find_pickles(folder):
        return Trial(failure=f"it holds pickles: {', '.join(pickles)}", pictures=0, errors=())
    asked = {
        "image": [base64.b64encode(data).decode("ascii") for data, _ in pictures],
        "prompt": [prompt for _, prompt in pictures],
    }
    command = [sys.executable, "-P", str(PROBE), str(folder)]
    try:
        done = subprocess.run(  # noqa: S603
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Trial(failure=f"it does not answer within {TIMEOUT_SECONDS} s", pictures=0, errors=())
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return Trial(failure=f"it does not load in a fresh process: {last[0][:500]}", pictures=0, errors=())
    found = json.loads(done.stdout.strip().splitlines()[-1])["errors"]
    return Trial(failure="", pictures=len(pictures), errors=tuple(error for error in found if error))


def find_pickles(folder: Path) -> list[str]:
    """Files of a folder that would have to be unpickled, by their names and by how they begin."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix in SUFFIXES or start.startswith(PICKLES):
            found.append(str(path.relative_to(folder)))
    return found
