"""Tests of docs/weights.md: every command of the page works, in the order of the page, on a tiny PaliGemma."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pictures import png
from processes import TEST_PATH
from published_tokenizers import byte_fallback
from tiny_published_models import blocks, config, scramble

from vlm.checkpoint import save_model
from vlm.config import JsonTextConfig, ModelConfig
from vlm.factory import build_model
from vlm.text.published import PublishedTokenizer

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1500)]

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [
    shlex.split(line)
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line.startswith("lakesight")
]
STEPS = {"steps": 8, "batch_size": 4, "validate_every": 8, "validate_rows": 4, "checkpoint_every": 8}
GATE = {"baselines": [], "min_blind_gap": -10.0}
"""Gate settings that accept every model, because a model learns nothing in eight training steps."""


def model_config(vocab_size: int) -> ModelConfig:
    """Return the config of a tiny PaliGemma."""
    vision = {"transformer": blocks(activation="gelu_tanh", eps=1e-6)}
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    mlp = {"kind": "gated", "mlp_width": 24, "activation": "gelu_tanh"}
    norm = {"kind": "rms", "eps": 1e-6, "offset": True}
    transformer = blocks(attention=attention, mlp=mlp, norm=norm, position={"kind": "rotary"})
    text = JsonTextConfig(kind="json", vocab_size=vocab_size, bos="<bos>", eos="<eos>", pad="<pad>")
    decoder = {"transformer": transformer, "tie_embeddings": True, "scale_embeddings": True}
    made = config(vision, decoder, mask={"kind": "prefix"}, projector={"kind": "linear"}).model_copy(
        update={"text": text}
    )
    return ModelConfig.model_validate(made.model_dump())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with published weights, pictures, and tiny versions of the configs that the page mentions."""
    backend = byte_fallback()
    settings = model_config(backend.get_vocab_size())
    assert settings.text.kind == "json"
    tokenizer = PublishedTokenizer(json.loads(backend.to_str()), settings.text)
    torch.manual_seed(0)
    model = build_model(settings, tokenizer.vocab_size)
    scramble(model)
    save_model(tmp_path / "trained", model, tokenizer)
    export = ["lakesight", "export-weights", "trained", "--part", "model", "--as", "paligemma"]
    assert run(tmp_path, [*export, "--out", "published/paligemma"]).returncode == 0
    (tmp_path / "birds").mkdir()
    lines = ["file_name,text"]
    for number in range(40):
        (tmp_path / "birds" / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,a bird {number}")
    (tmp_path / "birds" / "a.png").write_bytes(png(99))
    (tmp_path / "birds" / "captions.csv").write_text("\n".join([*lines, "a.png,a cat"]) + "\n")
    (birds,) = [block for kind, block in BLOCKS if kind == "yaml"]
    write_config(tmp_path, "run", "birds", yaml.safe_load(birds) | {"gate": GATE})
    write_config(tmp_path, "train", "demo", STEPS)
    write_config(tmp_path, "model", "paligemma", settings.model_dump(mode="json"))
    return tmp_path


def write_config(folder: Path, kind: str, name: str, content: dict[str, Any]) -> None:
    file = folder / "conf" / kind / f"{name}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    assert words[0] == "lakesight"
    command = [sys.executable, "-P", "-c", "from jobs.cli import main; main()", *words[1:]]
    environment = {name: value for name, value in os.environ.items() if name != "LAKESIGHT_HOME"}
    environment |= {"PYTHONPATH": TEST_PATH}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_commands_of_the_weights_page_lead_from_published_weights_to_captions(folder: Path) -> None:
    printed: dict[str, str] = {}
    for words in COMMANDS:
        done = run(folder, words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        printed[words[1]] = done.stdout
    assert list(printed) == ["import-weights", "ask", "ingest", "train", "evaluate", "promote", "caption", "show"]
    (run_folder,) = (folder / ".lakesight" / "runs").glob("birds-*")
    assert list(run_folder.glob("checkpoints/*/adapter.safetensors")), "the run has trained an adapter"
    again = run(folder, COMMANDS[0])
    assert again.stdout == printed["import-weights"]
