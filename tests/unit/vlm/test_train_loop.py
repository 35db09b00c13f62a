"""Tests of the training loop, the optimizer, schedules, frozen parameters, weight averages and checkpoints."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, fit_tiny, tiny_batch, tiny_config, tiny_model

from vlm.batch import IGNORE, Batch
from vlm.checkpoint import (
    atomic_folder,
    load_model,
    load_weights,
    model_weights,
    save_model,
    save_weights,
    verify_folder,
)
from vlm.config import ScheduleConfig, StableScheduleConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.factory import build_model
from vlm.layers.block import compile_blocks, recompute_blocks
from vlm.layers.position import MixedRotary
from vlm.model import VisionLanguageModel
from vlm.seeds import mix
from vlm.text.base import Tokenizer
from vlm.training.loop import NotFiniteError, StepReport
from vlm.training.objective import blind_losses
from vlm.training.optim import averaged_weights, build_adamw, parameter_groups, schedule, set_trainable, update_average
from vlm.training.state import load_state, save_state, snapshot_training

TEXTS = [("", "red car"), ("", "blue bus"), ("", "old iphone")]


def run(
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    start: int,
    lr: float,
    rows_at_once: int = 9,
    label_smoothing: float = 0.0,
) -> list[StepReport]:
    parts = (in_parts(batch, rows_at_once) for batch in batches)
    return fit_tiny(model, optimizer, parts, lr=lr, start=start, label_smoothing=label_smoothing)


def in_parts(batch: Batch, rows: int) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(torch.split(t, rows) for t in batch.tensors()), strict=True)]


def fresh(variant: str, dropout: float = 0.0) -> tuple[VisionLanguageModel, Tokenizer, torch.optim.AdamW]:
    config = tiny_config(variant)
    decoder = config.decoder.transformer.model_copy(update={"dropout": dropout, "stochastic_depth": dropout})
    config = config.model_copy(update={"decoder": config.decoder.model_copy(update={"transformer": decoder})})
    _, tokenizer = tiny_model(variant)
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)
    return model, tokenizer, build_adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_variant_learns_the_captions_of_its_training_pictures(variant: str) -> None:
    model, tokenizer, optimizer = fresh(variant)
    batch = tiny_batch(model, tokenizer, TEXTS)
    reports = run(model, optimizer, itertools.repeat(batch, 120), start=0, lr=5e-3)
    cap = model.config.decoder.soft_cap or math.inf  # with a soft cap, two logits differ by at most twice the cap
    least = math.log1p((tokenizer.vocab_size - 1) * math.exp(-2 * cap))
    assert least <= reports[-1].loss < least + 0.1
    right, wrong, tokens = blind_losses(model.eval(), batch, batch.pixels_PHWC.roll(1, 0))
    assert float((wrong - right).sum() / tokens.sum()) > 0.5


def test_a_resumed_training_loop_equals_an_uninterrupted_training_loop_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for stop in (12, 5):
        model, tokenizer, optimizer = fresh("other", dropout=0.2)
        batches = [tiny_batch(model, tokenizer, TEXTS, seed=step) for step in range(12)]
        run(model, optimizer, iter(batches[:stop]), start=0, lr=3e-3)
        if stop < 12:
            snapshot = snapshot_training(model_weights(model), model, optimizer, stop)
            run(
                model, optimizer, iter(batches[stop:]), start=stop, lr=3e-3
            )  # training continues before the snapshot is written
            with atomic_folder(tmp_path / "step_000005") as folder:
                save_weights(folder, snapshot.weights, model.config, tokenizer)
                save_state(folder, snapshot)
            model, tokenizer, optimizer = fresh("other", dropout=0.2)
            load_weights(model, tmp_path / "step_000005" / "model.safetensors")
            assert load_state(tmp_path / "step_000005", model, optimizer) == stop
            run(model, optimizer, iter(batches[stop:]), start=stop, lr=3e-3)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_label_smoothing_changes_the_gradient_by_its_formula_but_not_the_reported_loss() -> None:
    reports: list[StepReport] = []
    for share in (0.0, 0.3):
        model, tokenizer, optimizer = fresh("other")
        batch = tiny_batch(model, tokenizer, TEXTS)
        reports += run(model, optimizer, iter([batch]), start=0, lr=1e-3, label_smoothing=share)
        model, *_ = fresh("other")
        logprobs_NV = model(batch).log_softmax(dim=1)
        labels_N = batch.labels_BT[batch.labels_BT != IGNORE]
        likely = logprobs_NV.gather(1, labels_N[:, None])
        (-(1 - share) * likely.mean() - share * logprobs_NV.mean()).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert reports[-1].grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert reports[0].loss == reports[1].loss
    assert reports[0].grad_norm != pytest.approx(reports[1].grad_norm, rel=0.01)


def test_a_loss_that_is_not_finite_stops_training_before_the_weights_change() -> None:
    model, tokenizer, optimizer = fresh("plain")
    with torch.no_grad():
        model.decoder.tokens.weight[5] = math.nan
    before = model.decoder.head.weight.clone()
    with pytest.raises(NotFiniteError, match=r"diverged.*step 7.*nan"):
        run(model, optimizer, iter([tiny_batch(model, tokenizer, TEXTS)]), start=7, lr=1.0)
    assert torch.equal(model.decoder.head.weight, before)


def test_a_batch_whose_targets_are_all_masked_stops_training_before_the_weights_change() -> None:
    model, tokenizer, optimizer = fresh("plain")
    before = model.decoder.head.weight.clone()
    batch = tiny_batch(model, tokenizer, TEXTS)
    masked = replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE))
    with pytest.raises(NotFiniteError, match=r"no target tokens.*step 7.*all targets are masked"):
        run(model, optimizer, iter([masked]), start=7, lr=1.0)
    assert torch.equal(model.decoder.head.weight, before)


def test_embeddings_and_1d_parameters_have_no_weight_decay_and_each_parameter_is_in_one_group() -> None:
    model, _, _ = fresh("other")
    decayed, free = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))  # type: ignore[call-overload]
    assert not decayed & free
    assert decayed | free == {id(p) for p in model.parameters()}
    assert id(model.decoder.tokens.weight) in free
    assert id(model.encoder.position) in free
    assert {p.ndim for p in model.parameters() if id(p) in decayed} == {2, 4}


def test_the_frequencies_of_rotary_positions_have_no_weight_decay() -> None:
    model, _, _ = fresh("parallel")
    assert isinstance(model.encoder.rotary, MixedRotary)
    free = {id(parameter) for parameter in parameter_groups(model, 0.1)[1]["params"]}  # type: ignore[attr-defined]
    assert id(model.encoder.rotary.frequency) in free


@pytest.mark.parametrize(
    ("config", "halfway", "end"),
    [
        ({"kind": "cosine", "floor": 0.1}, 0.55, 0.1),
        ({"kind": "linear", "floor": 0.1}, 0.55, 0.1),
        ({"kind": "constant"}, 1.0, 1.0),
        ({"kind": "warmup_stable_decay", "decay": 0.25, "floor": 0.1}, 1.0, 0.1),
    ],
)
def test_a_learning_rate_schedule_warms_up_to_its_peak_and_ends_at_its_floor(
    config: Any, halfway: float, end: float
) -> None:
    chosen = TypeAdapter(ScheduleConfig).validate_python(config)
    rates = [schedule(chosen, s, steps=111, warmup_steps=10) for s in range(111)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(halfway)
    assert rates[-1] == pytest.approx(end)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_decay_of_a_warmup_stable_decay_schedule_starts_at_the_configured_step() -> None:
    stable = StableScheduleConfig(kind="warmup_stable_decay", decay=0.25)
    rates = [schedule(stable, s, steps=101, warmup_steps=0) for s in range(101)]
    assert set(rates[:76]) == {1.0}
    assert rates[88] == pytest.approx(0.48)


RATES = {"encoder.*": 0.0, ".*norm.*": 1e-3, "(projector|decoder).*": 4e-3}


def test_the_first_matching_pattern_sets_the_learning_rate_and_parameters_without_a_match_are_frozen() -> None:
    model, _, _ = fresh("plain")
    set_trainable(model, RATES)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    groups = build_adamw(model, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, rates=RATES).param_groups
    shares = {id(p): group["lr_share"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert shares.get(id(parameter)) == (None if name not in learning else 0.25 if "norm" in name else 1.0), name
    assert [(group["lr_share"], group["weight_decay"]) for group in groups] == [(1.0, 0.1), (1.0, 0.0), (0.25, 0.0)]
    set_trainable(model, {"encoder.*": 1e-3})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("encoder.")
    }
    with pytest.raises(ConfigError, match=r"not the first match of any parameter.*Got: decoder.head.*, nothing\. Fix"):
        set_trainable(model, {"decoder.*": 1.0, "decoder.head.*": 1.0, "nothing": 0.0})


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_accumulation_and_recomputed_blocks_do_not_change_a_training_step(variant: str) -> None:
    ends, saved = [], []
    for rows, recompute in ((9, False), (9, True), (2, True)):
        model, tokenizer, optimizer = fresh(variant)
        if recompute:
            recompute_blocks(model)
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            batch = tiny_batch(model, tokenizer, TEXTS)
            (report,) = run(model, optimizer, iter([batch]), start=0, lr=1e-3, rows_at_once=rows)
        ends.append((report.loss, report.grad_norm))
        saved.append(kept)
    assert ends[1] == ends[0]
    assert saved[1] < 0.8 * saved[0]
    if variant != "routed":  # the balance loss is computed separately for each part of a batch
        assert ends[2] == pytest.approx(ends[0], rel=1e-5)


@pytest.mark.matrix  # compiling the blocks with the C++ compiler takes half a minute
def test_compiled_blocks_train_as_uncompiled_blocks_do_and_are_compiled_only_for_training() -> None:
    from torch._dynamo.utils import counters  # a slow import that only this test needs

    counters.clear()
    reports = []
    for compiled in (False, True):
        model, tokenizer, optimizer = fresh("plain")
        if compiled:
            compile_blocks(model)
            recompute_blocks(model)
        longer = [*TEXTS[:2], ("", "a long red car")]
        batches = [tiny_batch(model, tokenizer, texts) for texts in (TEXTS, TEXTS, longer)]
        reports.append(run(model, optimizer, iter(batches), start=0, lr=1e-3))
        assert bool(counters["stats"]["unique_graphs"]) == compiled
    for eager, kernels in zip(*reports, strict=True):
        assert (kernels.loss, kernels.grad_norm) == pytest.approx((eager.loss, eager.grad_norm), rel=1e-4)
    made = counters["stats"]["unique_graphs"]
    assert made == 2, "one graph for encoder blocks, one for decoder blocks of any length"
    model.eval()(tiny_batch(model, tokenizer, [("", "a length that is new")]))
    assert counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_from_every_batch(variant: str) -> None:
    model, tokenizer, optimizer = fresh(variant, dropout=0.2)
    with_gradient: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: with_gradient.append(name))  # type: ignore[no-untyped-call]
    run(model, optimizer, iter([tiny_batch(model, tokenizer, [("", "a")])] * 2), start=0, lr=1e-3)
    assert sorted(with_gradient) == sorted([name for name, _ in model.named_parameters()] * 2)


def test_a_frozen_encoder_is_not_updated_and_has_neither_optimizer_state_nor_a_backward_pass() -> None:
    model, tokenizer, _ = fresh("plain")
    set_trainable(model, RATES)
    optimizer = build_adamw(model, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, rates=RATES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    features: list[bool] = []
    model.encoder.register_forward_hook(lambda _, __, out: features.append(out.requires_grad))
    run(model, optimizer, iter([tiny_batch(model, tokenizer, TEXTS)] * 2), start=0, lr=4e-3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("encoder.")}
    assert {id(p) for p in optimizer.state} == {id(p) for name, p in model.named_parameters() if name in moved}
    assert features == [False, False]


def test_the_seed_function_mix_gives_different_low_32_bits_for_every_seed_step_and_rank() -> None:
    seeds = [mix(s, t, r) for s in range(8) for t in range(50) for r in range(8)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_equals_the_saved_model(variant: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(variant)
    save_model(tmp_path, model, tokenizer)
    loaded, _ = load_model(tmp_path)
    batch = tiny_batch(model, tokenizer, TEXTS)
    assert torch.equal(loaded(batch), model(batch))
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_loading_weights_of_another_model_raises_an_error_that_lists_all_differences(tmp_path: Path) -> None:
    plain, tokenizer = tiny_model("plain")
    save_model(tmp_path, plain, tokenizer)
    other, _ = tiny_model("other")
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, tmp_path / "model.safetensors")
    message = str(caught.value)
    assert "missing decoder.blocks.0.mlp.gate_up.weight" in message
    assert "unexpected decoder.position.weight" in message
    assert "encoder.position has shape (1, 5, 16), the model needs (1, 16, 16)" in message


def test_the_function_verify_folder_reports_missing_or_truncated_or_changed_files(tmp_path: Path) -> None:
    def write() -> Path:
        with atomic_folder(tmp_path / "step_000001") as folder:
            (folder / "a").write_bytes(b"aaaa")
            (folder / "b").write_bytes(b"bbbb")
        return tmp_path / "step_000001"

    def found_damage() -> str:
        with pytest.raises(CheckpointError, match="the checkpoint is damaged") as caught:
            verify_folder(tmp_path / "step_000001")
        return caught.value.got

    verify_folder(write())
    (write() / "a").write_bytes(b"aaab")
    assert found_damage() == "a has changed since it was written"
    (write() / "a").write_bytes(b"aaa")
    assert found_damage() == "a has 3 bytes, expected 4"
    (write() / "b").unlink()
    assert found_damage() == "b is missing"
    (write() / "files.json").unlink()
    assert "files.json cannot be read" in found_damage()


def test_loading_a_truncated_weights_file_is_an_error(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("plain")
    save_model(tmp_path, model, tokenizer)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_model(tmp_path)


def test_a_checkpoint_of_a_newer_format_is_refused_and_a_checkpoint_without_a_format_version_is_loaded(
    tmp_path: Path,
) -> None:
    model, tokenizer = tiny_model("plain")
    save_model(tmp_path, model, tokenizer)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights, path)  # early versions of Lakesight wrote no format version
    assert torch.equal(load_model(tmp_path)[0].decoder.tokens.weight, model.decoder.tokens.weight)
    save_file(weights, path, {"lakesight_format": "3"})
    (tmp_path / "config.json").write_text('{"new_setting": 1}')
    with pytest.raises(CheckpointError, match="format 3, and this version reads formats up to 2"):
        load_model(tmp_path)


def test_an_old_checkpoint_whose_attention_pooling_read_other_tokens_is_refused_and_its_format_is_named(
    tmp_path: Path,
) -> None:
    for variant, refused in (("capped", True), ("plain", False)):
        model, tokenizer = tiny_model(variant)
        save_model(tmp_path / variant, model, tokenizer)
        load_model(tmp_path / variant)
        path = tmp_path / variant / "model.safetensors"
        save_file(load_file(path), path, {"lakesight_format": "1"})
        if not refused:
            load_model(tmp_path / variant)
            continue
        with pytest.raises(CheckpointError, match="format 1, in which the pooling query also read the class token"):
            load_model(tmp_path / variant)


def test_the_moving_average_replaces_the_weights_only_inside_the_averaged_weights_block() -> None:
    weight, idle = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight, idle], lr=0.5)
    expected = None
    for step in range(30):
        weight.grad = torch.randn(3, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        update_average(optimizer, 0.6, step)
        new = weight.detach().double()
        decay = min(0.6, (1 + step) / (10 + step))
        expected = new if expected is None else decay * expected + (1 - decay) * new
    learned = weight.detach().clone()
    with averaged_weights(optimizer):
        torch.testing.assert_close(weight.double(), expected)
        assert not torch.allclose(weight, learned, atol=0.05)
        assert torch.equal(idle, torch.ones(2)), "a parameter without a gradient has no average"
    assert torch.equal(weight, learned)

    idle.grad = torch.ones(2)  # as if an expert gets its first token only now
    optimizer.step()
    update_average(optimizer, 0.6, 30)
    assert not torch.equal(idle, torch.ones(2))
