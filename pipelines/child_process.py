"""Functions that select the environment of a child process, end a process group, and look up a process by its id."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

from vlm.errors.printable import SECRET_NAME

PASSED_ON = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|LANGUAGE|LC_[A-Z]+|TZ|TMPDIR|HOSTNAME|VIRTUAL_ENV|CONDA_PREFIX"
    "|XDG_CACHE_HOME|JAVA_HOME|LAKESIGHT_HOME"
    "|(PYTHON|LD_|DYLD_|MALLOC_|CUDA_|CUBLAS_|CUDNN_|NVIDIA_|NCCL_|GLOO_|TORCH|PYTORCH|TRITON_|OMP_|GOMP_|MKL_|KMP_|OPENBLAS_|HIP_|HSA_|ROCR_)[A-Z0-9_]+"
)
"""Allow-list of the environment variables that a child process receives."""
STORE_VARIABLES = (
    "(AWS|AZURE|GOOGLE|GCS|GCLOUD|CLOUDSDK|FSSPEC|HADOOP|HDFS|KRB5)[A-Z0-9_]*|CLASSPATH|SSL_CERT_(FILE|DIR)"
    "|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|BOTO_CONFIG|((HTTP|HTTPS|ALL|NO)_PROXY|(http|https|all|no)_proxy)"
)
"""Pattern of the variables from which client libraries of object stores and web servers read credentials, certificates
and proxies."""
WORKER_VARIABLES = "LAKESIGHT_WORKER_VARIABLES"
"""Environment variable with a comma-separated list of further variables that Spark's Python workers keep."""
READS_URLS = "LAKESIGHT_READS_URLS"
"""Environment variable that is set if Spark's Python workers read URLs, and therefore keep the STORE_VARIABLES."""


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment of a child process: `more`, and the variables of this process that PASSED_ON allows.

    A variable of this process whose name matches SECRET_NAME is not passed on, even if PASSED_ON allows the name.
    """
    allowed = {
        name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name) and not SECRET_NAME.search(name)
    }
    return allowed | more


def drop_other_variables(*needed: str) -> None:
    """Remove the environment variables of this process, except those that child processes receive and those whose names
    match a pattern in `needed`.

    A torch rank calls this function before it imports torch, because Spark starts a rank on an executor with all
    variables of the executor. `executor/python_daemon.py` calls this function before it starts Spark's Python daemon.
    """
    for name in os.environ.keys() - child_environment().keys():
        if not any(re.fullmatch(pattern, name) for pattern in needed):
            del os.environ[name]


def end_group(leader: subprocess.Popen[bytes], seconds: float = 5.0) -> None:
    """End a process that was started with `start_new_session`, and all processes in its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # On macOS, `killpg` raises EPERM if all processes of the group have ended but were not waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(seconds)


def start_ticks(pid: int) -> int:
    """Return the start time of a process in clock ticks since the boot.

    Return 0 if the start time cannot be read, for example because the system is not Linux.

    The system may reuse a process id after the process has ended, but not with the same start time.
    """
    fields = _read_stat(pid)
    return int(fields[19]) if fields else 0


def is_running(pid: int, ticks: int) -> bool:
    """Return whether a process is running, given its process id and its start time.

    On Linux, a process that has ended does not count as running, even if its parent has not waited for it yet.

    Args:
        pid: id of a process in the pid namespace of this process.
        ticks: start time of the process (`start_ticks`), or 0 if the start time is not known.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process belongs to another user
    fields = _read_stat(pid)
    if not fields:  # not on Linux, or another user's process is hidden
        return True
    return fields[0] not in ("Z", "X") and (not ticks or int(fields[19]) == ticks)


def pid_namespace() -> str:
    """Return the name of this process's pid namespace. On systems other than Linux, return an empty string.

    Each container usually has its own pid namespace. A process id identifies a process only within its pid namespace.
    """
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the program name, or an empty list if the file cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The second field is the program name in parentheses, and the name may contain blanks and parentheses.
    return stat.rpartition(")")[2].split()
