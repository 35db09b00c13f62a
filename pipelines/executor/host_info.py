"""Description of a host: its Python packages, CPU, memory and GPUs, collected with the standard library only.

No third-party package is imported, so a host that lacks packages can still report which packages are missing. The
versions of torch and CUDA are read from torch's files. An import of torch would take seconds, and torch's memory would
stay allocated in the executor's Python worker.
"""

from __future__ import annotations

import hashlib
import json
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
    "pandas": "pandas",  # TorchDistributor needs pandas on executors
    "pillow": "PIL",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "regex": "regex",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
}
"""Names of the Python distributions that a rank needs, each with the name of one of its modules."""

SOURCES = ("vlm", "pipelines/worker")
"""Packages whose sources are hashed as the training code."""

UNKNOWN = "unknown"
GPU_SECONDS = 20.0
"""Timeout of nvidia-smi, in seconds."""


def describe_host() -> dict[str, object]:
    """Return a description of this Python interpreter and its host, with the fields of `run_folder.Host`."""
    packages = {name: _version(name) if find_spec(module) else "" for name, module in PACKAGES.items()}
    torch_version = _torch_version() if packages["torch"] else {}
    driver, gpus = _query_gpus()
    return {
        "name": socket.gethostname(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "executable": sys.executable,
        "python": platform.python_version(),
        "packages": packages | ({"torch": torch_version["__version__"]} if torch_version else {}),
        "cuda": torch_version.get("cuda") or "",
        "nccl": _nccl() if torch_version.get("cuda") else "",
        "driver": driver,
        "gpus": gpus,
        "code": combine_hashes(hash_sources()),
    }


def hash_sources() -> dict[str, str]:
    """Hash the Python files of the packages in SOURCES.

    Return the hash of each file. The keys are the paths of the files, relative to the project.
    """
    found = {}
    for name in SOURCES:
        spec = find_spec(name.replace("/", "."))
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(root).rglob("*.py")):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                found[f"{name}/{path.relative_to(root).as_posix()}"] = digest
    return found


def combine_hashes(sources: dict[str, str]) -> str:
    """Return the digest of the training code, which is a hash of the hashes of all source files."""
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def _version(distribution: str) -> str:
    """Return the version of an importable distribution, or UNKNOWN if the distribution has no metadata."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def _torch_version() -> dict[str, str | None]:
    """Run torch/version.py and return its variables, such as `cuda` and `__version__` (with the build label)."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def _nccl() -> str:
    """Return the version of the NCCL distribution that torch requires, or UNKNOWN if torch requires none.

    If torch itself contains NCCL, only `import torch` can tell the version of NCCL. The result is also UNKNOWN if torch
    or the NCCL distribution has no metadata.
    """
    try:
        needed = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return UNKNOWN
    names = [found[0] for requirement in needed if (found := re.match(r"nvidia-nccl-cu\d+", requirement))]
    return _version(names[0]) if names else UNKNOWN


def _query_gpus() -> tuple[str, list[str]]:
    """Return the version of the GPU driver and the names of the GPUs, or an error message and no names.

    If the host has no nvidia-smi, the version is empty and there are no names.
    """
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
