"""What a Python has to train with, and the machine below it, told without importing any of it.

The standard library alone is needed, so that a host on which everything else is missing can still say so; and torch,
whose import takes seconds and would stay in the executor's worker for good, is read from its files.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "lakesight": "pipelines",
    "numpy": "numpy",
    "pandas": "pandas",  # TorchDistributor's own need, on executors
    "pillow": "PIL",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
}
"""What a rank imports: distributions, and a module of each."""

UNKNOWN = "unknown"
GPU_SECONDS = 20.0
"""How long a host's GPU driver may take to answer."""


def describe() -> dict[str, object]:
    """This interpreter and its machine: the fields of a `pipelines.formats.run_folder.Host`."""
    packages = {name: _version(name) if find_spec(module) else "" for name, module in PACKAGES.items()}
    told = _told_by_torch() if packages["torch"] else {}
    driver, gpus = _ask_driver()
    return {
        "name": socket.gethostname(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "executable": sys.executable,
        "python": platform.python_version(),
        "packages": packages | ({"torch": told["__version__"]} if told else {}),
        "cuda": told.get("cuda") or "",
        "nccl": _nccl() if told.get("cuda") else "",
        "driver": driver,
        "gpus": gpus,
    }


def _version(distribution: str) -> str:
    """Of a distribution that is there, if only as modules on the path."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def _told_by_torch() -> dict[str, str | None]:
    """The names that torch/version.py defines: the version with its build, and the CUDA it was built with."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def _nccl() -> str:
    """Torch's wheels leave NCCL to a distribution of its own; builds that hold it do not tell without being loaded."""
    try:
        needed = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return UNKNOWN
    names = [found[0] for requirement in needed if (found := re.match(r"nvidia-nccl-cu\d+", requirement))]
    return _version(names[0]) if names else UNKNOWN


def _ask_driver() -> tuple[str, list[str]]:
    """Version of the GPU driver and names of the GPUs; the error of a driver that does not answer is its version."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "", []
    command = [smi, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=GPU_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}", []
    if done.returncode:
        return f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[:200]}", []
    rows = [line.split(", ", 1) for line in done.stdout.splitlines()]
    return (rows[0][0] if rows else ""), [name for _, name in rows]
