"""Tests of models that are sharded over ranks: initial weights, and each rank's part of a checkpoint.

The tests use a process group that does not communicate, because no rank needs the rows of another rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlm.checkpoint import TensorRows, fill_weights, model_weights, save_model
from vlm.config import ModelConfig
from vlm.config.yaml_file import read_mapping
from vlm.factory import build_model
from vlm.files import join_rows
from vlm.model import VisionLanguageModel
from vlm.text import learn
from vlm.training.optim import build_adamw
from vlm.training.sharded import build_sharded, rows_of, written_tensors
from vlm.training.state import load_state, save_state, snapshot_training

CONFIGS = Path(__file__).parents[3] / "conf" / "model"
RANKS = 3
VOCABULARY = 29
CPU = torch.device("cpu")


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """Act as rank `rank` of RANKS ranks until the block ends."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def tiny(name: str = "base_tiny") -> ModelConfig:
    return ModelConfig.model_validate(read_mapping(CONFIGS / f"{name}.yml"))


def build(config: ModelConfig, *, draw: bool = True) -> VisionLanguageModel:
    torch.manual_seed(5)
    return build_sharded(config, VOCABULARY, CPU, draw=draw)


def local_rows(tensor: Tensor) -> Tensor:
    part = rows_of(tensor.detach())
    assert isinstance(part, TensorRows)
    return part.rows


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_tiny.yml")), ids=lambda path: path.stem)
def test_the_initial_weights_of_a_sharded_model_equal_those_of_an_unsharded_model(path: Path) -> None:
    config = tiny(path.stem)
    torch.manual_seed(5)
    whole = build_model(config, VOCABULARY)
    state = torch.get_rng_state()
    parts = []
    for rank in range(RANKS):
        with as_rank(rank):
            sharded = build(config)
            assert torch.equal(torch.get_rng_state(), state)
            parts.append({name: local_rows(p).clone() for name, p in sharded.named_parameters()})
            buffers = dict(sharded.named_buffers())
    assert parts[0].keys() == model_weights(whole).keys()
    for name, weight in model_weights(whole).items():
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_a_rank_initialises_one_parameter_at_a_time_and_keeps_only_its_own_rows() -> None:
    config = tiny()
    whole = build_model(config, VOCABULARY)
    sizes = [p.numel() for p in whole.parameters()]
    with as_rank(1):
        allocated = _LargestSum()
        with allocated:
            sharded = build(config)
        held = sum(local_rows(p).numel() for p in sharded.parameters())
    assert held <= sum(sizes) / RANKS + 1000
    assert allocated.largest <= max(sizes)


class _LargestSum(torch.overrides.TorchFunctionMode):
    """Torch function mode that records the size of the largest plain tensor that `torch.empty` has allocated."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func is torch.empty and not made.is_meta and not isinstance(made, DTensor):
            self.largest = max(self.largest, made.numel())
        return made


def test_each_rank_of_a_sharded_model_reads_its_own_rows_from_an_unsharded_checkpoint(tmp_path: Path) -> None:
    config = tiny()
    whole = build_model(config, VOCABULARY)
    save_model(tmp_path, whole, learn(config.text, ()))
    for rank in range(RANKS):
        with as_rank(rank):
            model = build(config, draw=False)
            fill_weights(
                config,
                {name: rows_of(p.detach()) for name, p in model.named_parameters()},
                tmp_path / "model.safetensors",
            )
            for name, p in model.named_parameters():
                part = rows_of(p.detach())
                assert isinstance(part, TensorRows)
                expected = whole.get_parameter(name)[part.first : part.first + len(part.rows)]
                assert torch.equal(part.rows, expected), name


def test_the_joined_checkpoint_slices_of_all_ranks_equal_the_checkpoint_of_an_unsharded_model(tmp_path: Path) -> None:
    config = tiny()
    torch.manual_seed(5)
    whole = build_model(config, VOCABULARY)
    optimizer = build_adamw(whole, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    for number, p in enumerate(whole.parameters()):
        p.grad = torch.full_like(p, number + 1.0)
    optimizer.step()
    snapshot = snapshot_training(model_weights(whole), whole, optimizer, 3)
    (tmp_path / "whole").mkdir()
    save_state(tmp_path / "whole", snapshot)
    save_file(snapshot.weights, tmp_path / "whole" / "model.safetensors")
    names = {"model.safetensors": "weights", "training.safetensors": "state"}
    for rank in range(RANKS):
        with as_rank(rank):
            model = build(config)
            fill_weights(
                config,
                {name: rows_of(p.detach()) for name, p in model.named_parameters()},
                tmp_path / "whole" / "model.safetensors",
            )
            optimizer = build_adamw(model, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
            assert load_state(tmp_path / "whole", model, optimizer) == 3
            part = snapshot_training(dict(model.named_parameters()), model, optimizer, 3)
            for name, field in names.items():
                save_file(getattr(part, field), tmp_path / f"{rank}-{name}")
    for name in names:
        join_rows([tmp_path / f"{rank}-{name}" for rank in range(RANKS)], tmp_path / name, {})
        joined, expected = load_file(tmp_path / name), load_file(tmp_path / "whole" / name)
        assert joined.keys() == expected.keys()
        assert all(torch.equal(joined[key], tensor) for key, tensor in expected.items())
        assert (tmp_path / name).stat().st_size == (tmp_path / "whole" / name).stat().st_size


def test_joining_a_truncated_checkpoint_slice_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10, 10)}, tmp_path / "0")
    data = (tmp_path / "0").read_bytes()
    (tmp_path / "1").write_bytes(data[:-7])
    with pytest.raises(ValueError, match="1 is truncated"):
        join_rows([tmp_path / "0", tmp_path / "1"], tmp_path / "joined", {})


def test_only_rank_0_writes_tensors_that_are_not_sharded() -> None:
    for rank in range(2):
        with as_rank(rank):
            assert bool(written_tensors({"step": torch.tensor(1.0)})) is (rank == 0)


def test_tied_parameters_of_a_sharded_model_stay_tied() -> None:
    config = tiny("vit_gpt2_tiny")
    assert config.decoder.tie_embeddings
    with as_rank(0):
        model = build(config)
        assert model.decoder.head.weight is model.decoder.tokens.weight
