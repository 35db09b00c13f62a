"""Tests that captioning processes of one host share the memory of the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import TEST_PATH
from tiny_runs import tiny_model_config

from vlm import text
from vlm.checkpoint import WEIGHTS, save_model
from vlm.config import ModelConfig
from vlm.factory import build_model

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs the memory of a process (Linux)"),
]


BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.6}


def write_model(folder: Path, depth: int, width: int = 1024) -> Path:
    """Write a model with random weights. With the default width, a block of the decoder has 50 MB in fp32."""
    settings = tiny_model_config().model_dump()
    settings["decoder"]["transformer"] |= {
        "width": width,
        "depth": depth,
        "attention": {"num_heads": width // 64, "num_kv_heads": width // 64, "head_dim": 64},
        "mlp": {"kind": "plain", "mlp_width": 4 * width},
    }
    config = ModelConfig.model_validate(settings)
    tokenizer = text.learn(config.text, [])
    torch.manual_seed(0)
    save_model(folder, build_model(config, tokenizer.vocab_size), tokenizer)
    return folder


class Measured(NamedTuple):
    """Memory of captioning processes in bytes, and what the processes have printed.

    Attributes:
        model: memory without the memory of libraries, because other programs of the machine may share the libraries.
        whole: memory including libraries.
        results: the line of JSON that each process prints, as a dict.
    """

    model: int
    whole: int
    results: list[dict[str, Any]]


def measure(model: Path, precision: str, count: int) -> Measured:
    """Start captioning processes one after the other, and measure their memory when all have loaded the model.

    The memory is the sum of proportional set sizes: a page that n processes share counts 1/n for each of them.
    """
    script = Path(__file__).parents[1] / "support" / "captioning_process.py"
    output = model.parent / f"captions-{precision}"
    output.mkdir(exist_ok=True)
    cache = model.parent / f"lakesight-models-{os.getuid()}"
    shutil.rmtree(cache, ignore_errors=True)  # without this cache, the first process must convert the weights
    command = [sys.executable, str(script), str(model), str(output), precision]
    environment = os.environ | {"PYTHONPATH": TEST_PATH, "TMPDIR": str(model.parent)}
    processes, results = [], []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
            assert process.stdout is not None
            results.append(json.loads(process.stdout.readline()))
        sizes = [memory_of(process.pid, model.parent) for process in processes]
    finally:
        for process in processes:
            process.communicate()
    return Measured(sum(size for size, _ in sizes), sum(size for _, size in sizes), results)


def memory_of(pid: int, folder: Path) -> tuple[int, int]:
    """Return two proportional set sizes of a process, in bytes.

    The first size counts only the memory that belongs to no file and the mapped files in the given folder. The second
    size counts all memory.
    """
    rollup = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    files, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Pss:"):
            files += int(line.split()[1])
    whole, anonymous = (int(rollup[name].split()[0]) for name in ("Pss", "Pss_Anon"))
    return 1024 * (anonymous + files), 1024 * whole


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_two_captioning_processes_need_the_memory_of_one_model(tmp_path: Path, precision: str) -> None:
    """The model has 1.2 GB in fp32. A model of 8 MB shows how much memory a process needs without a model."""
    large, small = write_model(tmp_path / "large", 24), write_model(tmp_path / "small", 1, width=256)
    base = {count: measure(small, precision, count) for count in (1, 2)}
    found = {count: measure(large, precision, count) for count in (1, 2)}
    one, two = (found[count].model - base[count].model for count in (1, 2))
    print(f"{precision}: model {one / 1e6:.0f} and {two / 1e6:.0f} MB, ratio {two / one:.3f}")
    print({c: [round(m.whole / 1e6) for m in (base[c], found[c])] for c in (1, 2)}, "MB with libraries")
    print({c: [round(m.model / 1e6) for m in (base[c], found[c])] for c in (1, 2)}, "MB without libraries")
    print("seconds", [result["seconds"] for result in found[1].results + found[2].results])
    assert one > 0.9 * BYTES_PER_WEIGHT[precision] / 4 * (large / WEIGHTS).stat().st_size
    assert two < 1.1 * one
    first, *others = found[1].results + found[2].results
    assert all(other["rows"] == first["rows"] for other in others)
