"""Smoke test of a registered model version: load its code and weights in a fresh process, and caption pictures."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.child_process import child_environment
from pipelines.config import Trial
from pipelines.platform import Platform
from pipelines.tracking.download import download_checked
from pipelines.tracking.registry import ModelVersion

CHILD_SCRIPT = Path(__file__).with_name("children") / "smoke_test_child.py"
TIMEOUT_SECONDS = 600
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""First bytes of pickle files and of the zip archives that torch.save writes."""
SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def smoke_test_version(platform: Platform, version: ModelVersion, pictures: Sequence[tuple[bytes, str]]) -> Trial:
    """Download a version, check its files, then load the version in a fresh process and caption pictures.

    The files must be the registered files, and no file may be a pickle. The fresh process reads the local copy that was
    checked, and receives no credentials (see `child_environment`).

    Args:
        platform: platform whose model registry is used.
        version: model version to test.
        pictures: pictures to caption, as pairs (bytes of the picture file, prompt).

    Raises:
        StageFailed: the version cannot be downloaded, or its files are not the registered files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return smoke_test_folder(download_checked(platform, version, Path(temporary)), pictures)


def smoke_test_folder(folder: Path, pictures: Sequence[tuple[bytes, str]]) -> Trial:
    """Run the smoke test on a model version whose files are in a local folder (see `smoke_test_version`)."""
    if pickles := find_pickles(folder):
        return Trial(failure=f"the version contains pickles: {', '.join(pickles)}", pictures=0, errors=())
    requests = {
        "image": [base64.b64encode(data).decode("ascii") for data, _ in pictures],
        "prompt": [prompt for _, prompt in pictures],
    }
    # With -P, Python does not import modules from the script's folder or the working folder.
    command = [sys.executable, "-P", str(CHILD_SCRIPT), str(folder)]
    try:
        done = subprocess.run(  # noqa: S603
            command,
            input=json.dumps(requests),
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Trial(failure=f"the version does not answer within {TIMEOUT_SECONDS} s", pictures=0, errors=())
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Trial(failure=f"the version does not load in a fresh process: {cause[:500]}", pictures=0, errors=())
    errors = json.loads(done.stdout.strip().splitlines()[-1])["errors"]
    return Trial(failure="", pictures=len(pictures), errors=tuple(error for error in errors if error))


def find_pickles(folder: Path) -> list[str]:
    """List the files in a folder that have the suffix or the first bytes of a pickle file."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix in SUFFIXES or start.startswith(PICKLES):
            found.append(str(path.relative_to(folder)))
    return found
