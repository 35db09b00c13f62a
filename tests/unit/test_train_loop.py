"""The loop learns, stops at the first NaN, and goes on from a checkpoint as if it had never stopped."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import VARIANTS, tiny_batch, tiny_config, tiny_model

from vlm.batch import Batch
from vlm.build import build_model
from vlm.checkpoint import (
    copy_training,
    load_model,
    load_training,
    load_weights,
    save_model,
    save_state,
    save_weights,
    verify_folder,
    weights_of,
    whole_folder,
)
from vlm.errors import CheckpointError
from vlm.model import VisionLanguageModel
from vlm.objective import blind_losses
from vlm.optim import build_adamw, cosine_lr, parameter_groups
from vlm.seeds import mix
from vlm.text.base import Tokenizer
from vlm.train import NotFiniteError, StepReport, fit

TEXTS = [("", "red car"), ("", "blue bus"), ("", "old iphone")]


def run(
    model: VisionLanguageModel, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], *, start: int, lr: float
) -> list[StepReport]:
    reports: list[StepReport] = []
    fit(
        model,
        optimizer,
        batches,
        start=start,
        lr_of=lambda step: lr,
        grad_clip=1.0,
        seed=1,
        rank=0,
        device=torch.device("cpu"),
        bf16=False,
        on_step=reports.append,
    )
    return reports


def fresh(variant: str, dropout: float = 0.0) -> tuple[VisionLanguageModel, Tokenizer, torch.optim.AdamW]:
    config = tiny_config(variant)
    decoder = config.decoder.transformer.model_copy(update={"dropout": dropout})
    config = config.model_copy(update={"decoder": config.decoder.model_copy(update={"transformer": decoder})})
    _, tokenizer = tiny_model(variant)
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)
    return model, tokenizer, build_adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_its_captions_from_the_pictures(variant: str) -> None:
    model, tokenizer, optimizer = fresh(variant)
    batch = tiny_batch(model, tokenizer, TEXTS)
    reports = run(model, optimizer, itertools.repeat(batch, 120), start=0, lr=5e-3)
    assert reports[-1].loss < 0.1
    right, wrong, tokens = blind_losses(model.eval(), batch, batch.pixels_PHWC.roll(1, 0))
    assert float((wrong - right).sum() / tokens.sum()) > 0.5


def test_a_loop_resumed_from_a_checkpoint_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for stop in (12, 5):
        model, tokenizer, optimizer = fresh("other", dropout=0.2)
        batches = [tiny_batch(model, tokenizer, TEXTS, seed=step) for step in range(12)]
        run(model, optimizer, iter(batches[:stop]), start=0, lr=3e-3)
        if stop < 12:
            copy = copy_training(weights_of(model), model, optimizer, stop)
            run(model, optimizer, iter(batches[stop:]), start=stop, lr=3e-3)  # while it is written, the loop goes on
            with whole_folder(tmp_path / "step_000005") as folder:
                save_weights(folder, copy.weights, model.config, tokenizer)
                save_state(folder, copy)
            model, tokenizer, optimizer = fresh("other", dropout=0.2)
            assert load_training(tmp_path / "step_000005", model, optimizer) == stop
            run(model, optimizer, iter(batches[stop:]), start=stop, lr=3e-3)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_loss_that_is_not_finite_stops_the_loop_before_the_weights_change() -> None:
    model, tokenizer, optimizer = fresh("plain")
    with torch.no_grad():
        model.decoder.tokens.weight[5] = math.nan
    before = model.decoder.head.weight.clone()
    with pytest.raises(NotFiniteError, match=r"diverged.*step 7.*nan"):
        run(model, optimizer, iter([tiny_batch(model, tokenizer, TEXTS)]), start=7, lr=1.0)
    assert torch.equal(model.decoder.head.weight, before)


def test_every_parameter_is_in_one_group_and_tables_and_vectors_do_not_decay() -> None:
    model, _, _ = fresh("other")
    decayed, free = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))  # type: ignore[call-overload]
    assert not decayed & free
    assert decayed | free == {id(p) for p in model.parameters()}
    assert id(model.decoder.tokens.weight) in free
    assert id(model.encoder.position) in free
    assert {p.ndim for p in model.parameters() if id(p) in decayed} == {2, 4}


def test_the_schedule_warms_up_peaks_and_ends_at_its_floor() -> None:
    rates = [cosine_lr(s, lr=1.0, steps=100, warmup_steps=10, final_lr_fraction=0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_seeds_differ_by_seed_step_and_rank_in_the_bits_torch_looks_at() -> None:
    seeds = [mix(s, t, r) for s in range(8) for t in range(50) for r in range(8)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_equal(variant: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(variant)
    save_model(tmp_path, model, tokenizer)
    loaded, _ = load_model(tmp_path)
    batch = tiny_batch(model, tokenizer, TEXTS)
    assert torch.equal(loaded(batch), model(batch))
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_weights_of_another_model_are_refused_with_all_that_differs(tmp_path: Path) -> None:
    plain, tokenizer = tiny_model("plain")
    save_model(tmp_path, plain, tokenizer)
    other, _ = tiny_model("other")
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, tmp_path / "model.safetensors")
    message = str(caught.value)
    assert "missing decoder.blocks.0.mlp.gate_up.weight" in message
    assert "left over decoder.position.weight" in message
    assert "encoder.position has shape (1, 5, 16), the model (1, 16, 16)" in message


def test_a_checkpoint_is_whole_until_a_byte_of_it_changes(tmp_path: Path) -> None:
    def write() -> Path:
        with whole_folder(tmp_path / "step_000001") as folder:
            (folder / "a").write_bytes(b"aaaa")
            (folder / "b").write_bytes(b"bbbb")
        return tmp_path / "step_000001"

    def complaint() -> str:
        with pytest.raises(CheckpointError, match="the checkpoint is damaged") as caught:
            verify_folder(tmp_path / "step_000001")
        return caught.value.got

    verify_folder(write())
    (write() / "a").write_bytes(b"aaab")
    assert complaint() == "a has other bytes than were written"
    (write() / "a").write_bytes(b"aaa")
    assert complaint() == "a has 3 bytes, 4 were written"
    (write() / "b").unlink()
    assert complaint() == "b is missing"
    (write() / "files.json").unlink()
    assert "files.json cannot be read" in complaint()


def test_a_truncated_weights_file_is_a_clear_error(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("plain")
    save_model(tmp_path, model, tokenizer)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_model(tmp_path)
