"""Tests of adapters: the fresh adapter, training, saving, loading, merging, errors, and resumed adapter runs."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, tiny_batch, tiny_model

from pipelines.config import TrainConfig
from pipelines.config import load_model as load_config
from pipelines.worker.train.initial_weights import ModelBuilder
from vlm.batch import Batch
from vlm.checkpoint import load_model, save_model
from vlm.config import AdapterConfig, ModelConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.factory import build_model
from vlm.files import file_digest
from vlm.model import VisionLanguageModel
from vlm.training.adapters import (
    LoraLinear,
    add_adapter,
    cast_frozen_to_bf16,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from vlm.training.loop import StepReport, fit
from vlm.training.optim import build_adamw
from vlm.training.state import load_state

TEXTS = [("", "red car"), ("", "blue bus"), ("", "old iphone")]
BLOCKS = AdapterConfig(pattern="decoder.blocks.*", rank=4, alpha=8)
CPU = torch.device("cpu")


def learn(
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    start: int = 0,
    bf16: bool = False,
) -> list[StepReport]:
    reports: list[StepReport] = []
    fit(
        model,
        optimizer,
        ([batch] for batch in batches),
        start=start,
        lr_schedule=lambda step: 1e-2,
        grad_clip=1.0,
        seed=1,
        rank=0,
        device=CPU,
        bf16=bf16,
        on_step=reports.append,
    )
    return reports


def adamw(model: VisionLanguageModel) -> torch.optim.AdamW:
    return build_adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def weights(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Save a model without an adapter, and return its folder."""
    save_model(tmp_path / "base", *tiny_model("plain"))
    return tmp_path / "base"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_changes_no_output_and_a_merged_adapter_keeps_the_trained_output(variant: str) -> None:
    scaled, tokenizer = tiny_model(variant)  # tiny_model has large weights, which enlarge rounding errors
    model = build_model(scaled.config, tokenizer.vocab_size).eval()
    batch, before = tiny_batch(model, tokenizer, TEXTS), weights(model)
    plain = model.requires_grad_(False)(batch)  # torch may add numbers in a different order if weights are frozen
    add_adapter(model, AdapterConfig(pattern="(encoder|projector|decoder.blocks).*"))
    assert torch.equal(model(batch), plain)
    adapted = {name for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in adapted for part in ("down", "up")}
    assert {"encoder.blocks.0.attention.qkv", "decoder.blocks.1.attention.out"} <= adapted
    assert "decoder.blocks.0.mlp.router" not in adapted
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.1)
    adapted_output = model(batch)
    assert not torch.allclose(adapted_output, plain, atol=1e-3)
    merge_adapter(model)
    torch.testing.assert_close(model(batch), adapted_output, atol=1e-5, rtol=1e-5)
    assert weights(model).keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_training_changes_only_adapter_weights_and_the_optimizer_holds_only_adapter_moments() -> None:
    model, tokenizer = tiny_model("plain")
    before = weights(model)
    add_adapter(model, AdapterConfig(pattern="decoder.*", rank=4, alpha=8))
    optimizer = adamw(model)
    reports = learn(model, optimizer, itertools.repeat(tiny_batch(model, tokenizer, TEXTS), 40))
    assert reports[-1].loss < 0.5 * reports[0].loss
    after = weights(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(trained)
    num_moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert num_moments == 2 * sum(p.numel() for p in trained)


def test_an_adapter_in_a_layer_after_the_last_router_can_be_trained() -> None:
    model, tokenizer = tiny_model("routed")
    add_adapter(model, AdapterConfig(pattern="decoder.head"))
    reports = learn(model, adamw(model), itertools.repeat(tiny_batch(model, tokenizer, TEXTS), 10))
    assert reports[-1].loss < reports[0].loss


def test_an_adapter_pattern_that_matches_no_layer_is_an_error_that_lists_similar_layer_names() -> None:
    model, _ = tiny_model("plain")
    with pytest.raises(ConfigError) as caught:
        add_adapter(model, AdapterConfig(pattern="decoder.blocks.*.atention.qkv"))
    message = str(caught.value)
    assert "matches no linear layer" in message
    assert "nearest: decoder.blocks.N.attention.qkv" in message
    assert "the whole of one of these names: encoder.blocks.N.attention.qkv" in message
    with pytest.raises(ConfigError, match="matches no linear layer"):
        add_adapter(model, AdapterConfig(pattern="qkv"))  # the pattern must match the whole name of a layer
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_an_output_head_with_tied_weights_is_an_error() -> None:
    model, _ = tiny_model("other")
    with pytest.raises(ConfigError, match=r"decoder.head, which shares its weight with decoder.tokens.weight"):
        add_adapter(model, AdapterConfig(pattern="decoder.*"))


def test_a_saved_adapter_and_its_base_weights_restore_the_trained_model(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(base)
    digest = file_digest(base / "model.safetensors")
    add_adapter(model, BLOCKS)
    batch = tiny_batch(model, tokenizer, TEXTS)
    learn(model, adamw(model), itertools.repeat(batch, 5))
    save_adapter(tmp_path / "adapter", model, BLOCKS, digest)
    restored, _ = load_model(base)
    state = torch.get_rng_state()
    load_adapter(tmp_path / "adapter", restored, digest)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(restored(batch), model.eval()(batch))
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter.safetensors", "adapter.json"}


def test_loading_an_adapter_into_other_weights_or_other_layers_is_an_error(base: Path, tmp_path: Path) -> None:
    digest, folder = file_digest(base / "model.safetensors"), tmp_path / "adapter"
    model, tokenizer = load_model(base)
    add_adapter(model, BLOCKS)
    save_adapter(folder, model, BLOCKS, digest)

    retrained, _ = tiny_model("plain", seed=2)  # the tensors of this model and of the base model have equal shapes
    save_model(tmp_path / "retrained", retrained, tokenizer)
    with pytest.raises(CheckpointError, match=r"trained on other weights.*Got.*Fix: load the weights"):
        load_adapter(folder, retrained, file_digest(tmp_path / "retrained" / "model.safetensors"))

    tensors = load_file(folder / "adapter.safetensors")
    tensors["decoder.head.up"] = tensors.pop("decoder.blocks.0.mlp.up.up")
    tensors["decoder.blocks.1.mlp.up.down"] = torch.zeros(5, 24)
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_adapter(folder, load_model(base)[0], digest)
    for problem in (
        "missing decoder.blocks.0.mlp.up.up",
        "unexpected decoder.head.up",
        "decoder.blocks.1.mlp.up.down has shape (5, 24), the model needs (4, 24)",
    ):
        assert problem in str(caught.value)

    (folder / "adapter.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(folder, load_model(base)[0], digest)
    (folder / "adapter.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter's config cannot be read.*adapter.json"):
        load_adapter(folder, load_model(base)[0], digest)


# ------------------------------------------------------------------------------------------------ weights of a run


def test_a_resumed_adapter_training_equals_the_uninterrupted_training_and_ends_with_a_plain_model(
    base: Path, tmp_path: Path
) -> None:
    config = ModelConfig.model_validate_json((base / "config.json").read_text())
    _, tokenizer = tiny_model("plain")
    start = ModelBuilder(config, TrainConfig(start_from=str(base), adapter=BLOCKS), tokenizer)
    ends = []
    for stop in (8, 3):
        torch.manual_seed(0)
        model = start.model(CPU)
        optimizer = adamw(model)
        batches = [tiny_batch(model, tokenizer, TEXTS, seed=step) for step in range(8)]
        learn(model, optimizer, iter(batches[:stop]))
        if stop < 8:
            (tmp_path / "middle").mkdir()
            start.write(tmp_path / "middle", start.copy(model, optimizer, stop), last=False)
            assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
            torch.manual_seed(9)
            model = start.model(CPU)
            optimizer = adamw(model)
            start.load(tmp_path / "middle", model)
            assert load_state(tmp_path / "middle", model, optimizer) == stop
            learn(model, optimizer, iter(batches[stop:]), start=stop)
        (tmp_path / f"end-{stop}").mkdir()
        start.write(tmp_path / f"end-{stop}", start.copy(model, optimizer, 8), last=True)
        ends.append(load_file(tmp_path / f"end-{stop}" / "model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert "model.safetensors" not in {p.name for p in (tmp_path / "middle").iterdir()}
    plain, _ = load_model(tmp_path / "end-8")
    torch.testing.assert_close(plain(batches[0]), model.eval()(batches[0]), atol=1e-5, rtol=1e-5)


def test_a_run_with_the_setting_start_from_begins_with_the_weights_of_the_given_folder(base: Path) -> None:
    _, tokenizer = tiny_model("plain")
    config = ModelConfig.model_validate_json((base / "config.json").read_text())
    model = ModelBuilder(config, TrainConfig(start_from=str(base)), tokenizer).model(CPU)
    given, _ = load_model(base)
    assert all(torch.equal(tensor, weights(given)[name]) for name, tensor in weights(model).items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["plain", "other", "looking", "routed"])
def test_converting_frozen_weights_to_bf16_does_not_change_training_under_bf16_autocast(variant: str) -> None:
    ends = []
    for cast in (False, True):
        model, tokenizer = tiny_model(variant)
        torch.manual_seed(0)
        add_adapter(model, BLOCKS)
        if cast:
            cast_frozen_to_bf16(model)
            bf16_names = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
            assert "decoder.blocks.0.attention.qkv.weight" in bf16_names
            assert ("decoder.blocks.0.mlp.experts.out.weight" in bf16_names) == (variant == "routed")
            assert model.decoder.tokens.weight.dtype == torch.float32
        reports = learn(model, adamw(model), [tiny_batch(model, tokenizer, TEXTS)] * 5, bf16=True)
        updates = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        ends.append(([report.loss for report in reports], updates))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])


def test_fine_tuning_a_model_of_three_billion_weights_needs_less_than_eight_gigabytes() -> None:
    """Compute the bytes of weights, adapter, gradients and moments on meta tensors (see docs/training.md#memory)."""
    config = load_config("paligemma")
    with torch.device("meta"):
        model = build_model(config, config.text.vocab_size)  # type: ignore[union-attr]
        add_adapter(model, AdapterConfig(pattern="decoder.blocks.*", rank=8))
        cast_frozen_to_bf16(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (frozen, trained) == (2_923_466_480, 8_921_088)
    assert stored + trained * (4 + 8) == 7_046_126_528  # 4 bytes per gradient and 8 bytes per pair of AdamW moments
