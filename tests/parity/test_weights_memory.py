"""The peak memory of a weight import is only slightly above the size of the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_published_models import blocks, config
from transformers import GPT2Config, GPT2LMHeadModel

from vlm.weights.files import write_weights

WIDTH, DEPTH, VOCAB = 1024, 6, 16_000

LOAD = """
import json, re, sys
from pathlib import Path

from vlm.config import ModelConfig
from vlm.weights.load import import_weights

def memory(which):
    return 1024 * int(re.search(which + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

folder, config, vocab_size = Path(sys.argv[1]), ModelConfig.model_validate_json(sys.argv[2]), int(sys.argv[3])
before = memory("VmRSS")
model, _ = import_weights(config, vocab_size, {"decoder": folder})
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": memory("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_an_import_is_less_than_15_percent_above_the_size_of_the_weights(tmp_path: Path) -> None:
    sizes = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 16, "n_positions": 64, "vocab_size": VOCAB}
    with torch.device("meta"):
        names = GPT2LMHeadModel(GPT2Config(**sizes)).state_dict()
    del names["lm_head.weight"]
    files = write_weights(tmp_path, ({name: torch.zeros(t.shape)} for name, t in names.items()), 25 * 10**7)
    assert len(files) == 3, "two shards and their index"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))

    attention = {"num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "bias": True}
    mlp = {"kind": "plain", "mlp_width": 4 * WIDTH, "activation": "gelu_tanh"}
    transformer = {**blocks(), "width": WIDTH, "depth": DEPTH, "attention": attention, "mlp": mlp}
    settings = config(decoder={"context": 64, "transformer": transformer, "tie_embeddings": True})
    arguments = [str(tmp_path), settings.model_dump_json(), str(VOCAB)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, env=env, check=True)
    measured = json.loads(done.stdout)
    assert measured["weights"] > 300e6
    assert measured["peak"] <= 1.15 * measured["weights"], measured
