"""What a host says of itself, and which hosts ranks can work on together."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.driver.train.hosts import compare, summary
from pipelines.errors import UserError
from pipelines.executor.host_info import describe
from pipelines.formats.run_folder import Host

GPUS = ("NVIDIA H200", "NVIDIA H200")


def host(name: str = "a", torch: str = "2.13.0+cu130", **fields: Any) -> Host:
    packages = {"lakesight": "0.1.0", "numpy": "2.4.6", "torch": torch} | fields.pop("packages", {})
    common = {"cores": 16, "memory_bytes": 64 * 2**30, "executable": "python3", "python": "3.11.7"}
    common |= {"cuda": "13.0", "nccl": "2.29.7", "driver": "580.82", "gpus": GPUS}
    return Host.model_validate({"name": name, "packages": packages} | common | fields)


def test_a_host_tells_its_torch_as_torch_itself_does_without_importing_it() -> None:
    told = Host.model_validate(describe())
    assert (told.name, told.executable) == (socket.gethostname(), sys.executable)
    assert (told.packages["torch"], told.cuda) == (torch.__version__, torch.version.cuda or "")
    assert all(told.packages.values())
    code = "import sys; from pipelines.executor.host_info import describe; describe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pyarrow", "pydantic"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("script", "driver", "gpus"),
    [
        ("echo '580.82, NVIDIA H200'; echo '580.82, NVIDIA H200'", "580.82", GPUS),
        ("echo 'Failed to initialize NVML' >&2; exit 9", "nvidia-smi failed: Failed to initialize NVML", ()),
    ],
)
def test_a_host_tells_its_gpus_or_why_their_driver_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, driver: str, gpus: tuple[str, ...]
) -> None:
    (smi := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = Host.model_validate(describe())
    assert (told.driver, told.gpus) == (driver, gpus)


def test_equal_hosts_are_taken_without_a_word_and_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    hosts = [host("a"), host("b")]
    compare(hosts, "0.1.0")
    assert caplog.records == []
    assert summary(hosts) == (
        "a, b; 16 cores, 64 GB each; 2 x NVIDIA H200; Python 3.11.7, torch 2.13.0+cu130; NCCL 2.29.7; driver 580.82"
    )


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (
            [host("a"), host("b", packages={"numpy": "", "torch": ""})],
            r"packages that ranks need are missing.*Got: no numpy, torch on host b \(python3\)\. Fix: install",
        ),
        (
            [host("a"), host("b", torch="2.6.0"), host("c")],
            r"different versions of torch.*2\.13\.0\+cu130 on host a \(.*\), host c \(.*\); 2\.6\.0 on host b \(",
        ),
        (
            [host("a", packages={"lakesight": "0.0.9"})],
            r"different versions of lakesight.*0\.0\.9 on host a \(python3\); 0\.1\.0 on the driver",
        ),
    ],
)
def test_hosts_on_which_ranks_cannot_work_together_are_refused_by_name(hosts: list[Host], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(hosts, "0.1.0")


def test_other_differences_between_hosts_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compare([host("a"), host("b", packages={"numpy": "1.26.4"}, driver="550.54", gpus=())], "0.1.0")
    place = "(python3)"
    assert caplog.messages == [
        f"the hosts of the ranks differ in numpy: 2.4.6 on host a {place}; 1.26.4 on host b {place}",
        f"the hosts of the ranks differ in driver: 580.82 on host a {place}; 550.54 on host b {place}",
        f"the hosts of the ranks differ in GPUs: NVIDIA H200, NVIDIA H200 on host a {place}; none on host b {place}",
    ]
