"""Tests of the weights files that the tasks of a host share: one task converts, and damaged files are replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import TEST_PATH
from tiny_models import tiny_model

import vlm
from pipelines.executor.shared_model import load_shared_captioner
from pipelines.worker.caption import load_captioner
from vlm.checkpoint import WEIGHTS, save_model
from vlm.config import Precision

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU converts weights in its own memory")
CONVERT = """
import sys, time
from pathlib import Path
import pipelines.worker.caption as worker
from pipelines.executor.shared_model import load_shared_captioner
from vlm.config import Precision
whole = worker.save_converted
def slowly(*arguments):
    print("converts", flush=True)
    whole(*arguments)
    time.sleep(float(sys.argv[2]))
worker.save_converted = slowly
print("asks", flush=True)
load_shared_captioner(Path(sys.argv[1]), "", remote=False, threads=1, precision=Precision.BF16)
print("loaded", flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the cache of models, in a temporary folder of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    load_captioner.cache_clear()
    return tmp_path / f"lakesight-models-{os.getuid()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = tiny_model("plain")
    save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model"


def load(folder: Path, precision: Precision = Precision.BF16, *, remote: bool = False) -> vlm.Captioner:
    """Load a model as the first task of a new Python worker does."""
    load_captioner.cache_clear()
    threads = torch.get_num_threads()
    return load_shared_captioner(folder, "", remote=remote, threads=threads, precision=precision)


def copies(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir()) if cache.exists() else []


def same_weights(one: vlm.Captioner, other: vlm.Captioner) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_a_model_in_its_stored_precision_needs_no_file_and_other_precisions_are_converted_once(
    folder: Path, cache: Path
) -> None:
    load(folder, Precision.FP32)
    assert copies(cache) == []
    first = load(folder)
    [converted] = copies(cache)
    inode = (converted / WEIGHTS).stat().st_ino
    assert same_weights(first, load(folder))
    assert [(path / WEIGHTS).stat().st_ino for path in copies(cache)] == [inode]
    assert same_weights(first, vlm.load(folder, device="cpu", precision="bf16"))
    load(folder, Precision.FP16)
    assert len(copies(cache)) == 2


def test_a_remote_model_is_copied_and_the_converted_weights_come_from_the_copy(folder: Path, cache: Path) -> None:
    loaded = load(folder, remote=True)
    assert len(copies(cache)) == 2
    assert same_weights(loaded, vlm.load(folder, device="cpu", precision="bf16"))


def test_a_damaged_file_of_converted_weights_is_written_again_and_loaded_models_keep_their_weights(
    folder: Path, cache: Path
) -> None:
    loaded = load(folder)
    expected = vlm.load(folder, device="cpu", precision="bf16")
    [converted] = copies(cache)
    whole = (converted / WEIGHTS).read_bytes()
    for damaged in (whole[:-1], whole[:-8] + bytes(8)):  # a shorter file, then other weights in a file of equal size
        (converted / "other").write_bytes(damaged)
        (converted / "other").rename(converted / WEIGHTS)
        assert same_weights(load(folder), expected)
        assert (converted / WEIGHTS).stat().st_size == len(whole)
    assert same_weights(loaded, expected)


@pytest.mark.faults
@pytest.mark.matrix
def test_two_processes_convert_a_model_once_although_a_process_was_killed_during_the_conversion(
    folder: Path, cache: Path
) -> None:
    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CONVERT, str(folder), str(seconds)]
        environment = os.environ | {"PYTHONPATH": TEST_PATH}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    victim = start(60)
    assert [line(victim), line(victim)] == ["asks", "converts"]
    assert [path.suffix for path in copies(cache)] == [".part"]
    others = [start(0) for _ in range(2)]
    assert [line(other) for other in others] == ["asks", "asks"]
    time.sleep(1)
    assert all(other.poll() is None for other in others), "the other processes wait for the process that converts"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    said = [other.communicate(timeout=60)[0].splitlines() for other in others]
    assert sorted(said) == [["converts", "loaded"], ["loaded"]]
    [converted] = copies(cache)
    assert not converted.suffix
    assert same_weights(load(folder), vlm.load(folder, device="cpu", precision="bf16"))
