"""Tests of the description of a host, and of the check that ranks can work together on several hosts."""

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

from pipelines.driver.train.code import read_code
from pipelines.driver.train.hosts import check_code, check_compatible, check_gpus, summarize, warn_of_idle_gpus
from pipelines.errors import UserError
from pipelines.executor.host_info import describe_host
from pipelines.formats.run_folder import Host

GPUS = ("NVIDIA H200", "NVIDIA H200")


def host(name: str = "a", torch: str = "2.13.0+cu130", **fields: Any) -> Host:
    packages = {"lakesight": "0.1.0", "numpy": "2.4.6", "torch": torch} | fields.pop("packages", {})
    common = {"cores": 16, "memory_bytes": 64 * 2**30, "executable": "python3", "python": "3.11.7"}
    common |= {"cuda": "13.0", "nccl": "2.29.7", "driver": "580.82", "gpus": GPUS}
    return Host.model_validate({"name": name, "packages": packages} | common | fields)


def test_the_description_of_a_host_has_the_torch_version_without_importing_torch() -> None:
    described = Host.model_validate(describe_host())
    assert (described.name, described.executable) == (socket.gethostname(), sys.executable)
    assert (described.packages["torch"], described.cuda) == (torch.__version__, torch.version.cuda or "")
    assert all(described.packages.values())
    code = "import sys; from pipelines.executor.host_info import describe_host; describe_host(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pyarrow", "pydantic"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("script", "driver", "gpus"),
    [
        ("echo '580.82, NVIDIA H200'; echo '580.82, NVIDIA H200'", "580.82", GPUS),
        ("echo 'Failed to initialize NVML' >&2; exit 9", "nvidia-smi failed: Failed to initialize NVML", ()),
    ],
)
def test_the_description_of_a_host_has_its_gpus_or_the_error_of_the_gpu_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, driver: str, gpus: tuple[str, ...]
) -> None:
    (smi := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    described = Host.model_validate(describe_host())
    assert (described.driver, described.gpus) == (driver, gpus)


def test_hosts_that_are_equal_cause_no_warning_and_are_summarized_in_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hosts = [host("a"), host("b")]
    check_compatible(hosts, "0.1.0")
    assert caplog.records == []
    assert summarize(hosts) == (
        "a, b; 16 cores, 64 GB each; 2 x NVIDIA H200; Python 3.11.7, torch 2.13.0+cu130; NCCL 2.29.7; driver 580.82"
    )


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (
            [host("a"), host("b", packages={"numpy": "", "torch": ""})],
            r"packages that ranks need are missing.*Got: no numpy, torch on host b \(python3\)\. Fix: on every host",
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
def test_incompatible_hosts_are_refused_and_the_error_names_the_hosts(hosts: list[Host], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_compatible(hosts, "0.1.0")


@pytest.mark.parametrize(
    ("lacking", "found"),
    [
        ({"gpus": (), "driver": "", "cuda": ""}, "no GPU on host b"),
        ({"gpus": (), "driver": "nvidia-smi failed: no NVML"}, "nvidia-smi failed: no NVML on host b"),
        ({"torch": "2.13.0+cpu", "cuda": ""}, r"torch 2\.13\.0\+cpu was built without CUDA on host b"),
    ],
)
def test_a_host_without_a_gpu_that_torch_can_use_is_refused_and_the_error_names_the_host(
    lacking: dict[str, Any], found: str
) -> None:
    check_gpus([host("a")])
    with pytest.raises(
        UserError, match=rf"would have no GPU that torch can use.*Got: {found} \(python3\)\. Fix: .*use_gpu=false"
    ):
        check_gpus([host("a"), host("b", **lacking)])


def test_harmless_differences_between_hosts_are_logged_as_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_compatible([host("a"), host("b", packages={"numpy": "1.26.4"}, driver="550.54", gpus=())], "0.1.0")
    python = "(python3)"
    assert caplog.messages == [
        f"the hosts of the ranks differ in numpy: 2.4.6 on host a {python}; 1.26.4 on host b {python}",
        f"the hosts of the ranks differ in driver: 580.82 on host a {python}; 550.54 on host b {python}",
        f"the hosts of the ranks differ in GPUs: NVIDIA H200, NVIDIA H200 on host a {python}; none on host b {python}",
    ]


def test_a_host_with_different_training_code_but_the_same_version_is_refused_and_the_error_names_the_host() -> None:
    code = read_code()
    assert describe_host()["code"] == code.digest
    check_code([host("a", code=code.digest), host("b")], code)  # host b reports no digest of its code
    with pytest.raises(
        UserError, match=rf"differs from the code that run.json records.*{code.digest} on the driver; 0123 on host b"
    ):
        check_code([host("a", code=code.digest), host("b", code="0123")], code)


@pytest.mark.parametrize(
    ("fields", "ranks", "visible", "advice"),
    [
        (
            {"gpus": GPUS[:1]},
            2,
            None,
            "2 ranks need a GPU each and host a has 1. To use the GPUs, add --set platform.ranks=1",
        ),
        ({"gpus": GPUS}, 2, "1", "--set platform.ranks=1"),
        ({"gpus": GPUS}, 3, None, "--set platform.ranks=2"),
        ({"gpus": GPUS}, 2, None, ""),
        ({"gpus": GPUS[:1]}, 1, None, ""),
        ({"gpus": GPUS[:1]}, 2, "", ""),  # the user has hidden the GPU
        ({"gpus": GPUS[:1]}, 2, "-1", ""),
        ({"gpus": GPUS[:1], "cuda": ""}, 2, None, ""),
        ({"gpus": ()}, 2, None, ""),
    ],
)
def test_a_warning_says_how_to_use_the_gpus_of_a_host_with_fewer_gpus_than_ranks(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any], ranks: int, visible: str | None, advice: str
) -> None:
    warn_of_idle_gpus(host("a", **fields), ranks, visible)
    assert len(caplog.messages) == bool(advice)
    assert advice in " ".join(caplog.messages)
