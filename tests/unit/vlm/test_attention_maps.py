"""Tests of attention maps: explicit attention equals the fused kernel, and the maps show the patches that matter."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_models import VARIANTS, tiny_batch, tiny_model, tiny_pixels

from pipelines.pages.attention import attention_panels
from vlm.generation.attention_maps import AttentionMaps, attention_maps, project_shares, rollout
from vlm.generation.generate import Completion, Request
from vlm.layers.attention import Attention, CrossAttention, record_weights
from vlm.layers.block import Block
from vlm.model import VisionLanguageModel
from vlm.projector import PixelShuffle
from vlm.text.base import Tokenizer
from vlm.text.prompt import prefix_ids


def ask(model: VisionLanguageModel, tokenizer: Tokenizer, prompt: str = "") -> tuple[Request, Completion]:
    request = Request(prefix_ids(tokenizer, model.config.num_slots, prompt), (tiny_pixels(1)[0],))
    return request, Completion(tokenizer.encode("a dog b"), text="a dog b")


@pytest.mark.parametrize("variant", VARIANTS)
def test_explicit_attention_equals_the_fused_attention_kernel_and_its_weights_sum_to_one(variant: str) -> None:
    model, tokenizer = tiny_model(variant)
    batch = tiny_batch(model, tokenizer, [("", "a cat"), ("what is it", "b"), ("a", "")])
    layers = [part for part in model.modules() if isinstance(part, Attention | CrossAttention)]
    with torch.inference_mode():
        fused = model(batch)
        with record_weights(layers) as recorded:
            explicit = model(batch)
        assert torch.allclose(fused, explicit, atol=1e-5, rtol=0)
        assert float(fused.std()) > 0.05
        for layer, (weights_BHTS,) in zip(layers, recorded, strict=True):
            assert torch.allclose(weights_BHTS.sum(dim=-1), torch.ones(()), atol=1e-5)
            assert layer.recorded is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", ["", "what is it"])
def test_models_of_every_kind_give_for_each_token_an_attention_map_over_the_patches(variant: str, prompt: str) -> None:
    model, tokenizer = tiny_model(variant)
    request, completion = ask(model, tokenizer, prompt)
    maps = attention_maps(model, tokenizer, request, completion)
    side = model.config.image.size // model.config.vision.stem.stride
    assert maps.patches().shape == (len(completion.tokens), side, side)
    assert [maps.text[start:end] for start, end in maps.spans] == [tokenizer.decode([t]) for t in completion.tokens]
    sums_TLH = maps.decoder_TLHN.sum(dim=-1)
    assert float(sums_TLH.max()) > 0.01
    assert bool((sums_TLH < 1 + 1e-5).all())
    assert torch.allclose(sums_TLH, torch.ones(()), atol=1e-5) == (variant == "looking")
    assert bool((maps.rollout_NP.sum(dim=-1) < 1 + 1e-5).all())
    assert [word for word, _ in maps.words()] == completion.text.split()


def test_the_attention_map_of_a_token_shows_the_attention_weights_at_the_position_that_predicts_the_token() -> None:
    """The test computes the queries and keys of the first layer from the embeddings, without the model's attention."""
    model, tokenizer = tiny_model("plain")
    request, completion = ask(model, tokenizer, "what")
    maps = attention_maps(model, tokenizer, request, completion)
    block, slots, prefix = model.decoder.blocks[0], model.config.num_slots, len(request.prefix)
    assert model.decoder.position is not None
    assert isinstance(block, Block)
    row = torch.tensor([[*request.prefix, *completion.tokens]])
    with torch.inference_mode():
        x_BTW, _ = model.embed(row, model.encode(request.pixels[0][None]))
        x_BTW = x_BTW + model.decoder.position.weight[: row.shape[1]]
        q, k, _ = block.attention.qkv(block.attention_norm(x_BTW))[0].chunk(3, dim=-1)
    for token in range(len(completion.tokens)):
        at = prefix - 1 + token
        for head in range(4):
            part = slice(6 * head, 6 * head + 6)
            weights = torch.softmax(q[at, part] @ k[: at + 1, part].T / 6**0.5, dim=-1)
            assert torch.allclose(maps.decoder_TLHN[token, 0, head], weights[:slots], atol=1e-5)


def test_the_attention_rollout_of_two_layers_multiplies_their_attention_with_residual_connections() -> None:
    first = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]])
    second = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    expected = torch.tensor([[0.5, 0.5], [0.0, 1.0]]) @ torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    assert torch.allclose(rollout([first, second]), expected)


def test_the_attention_of_a_feature_that_merges_several_patches_is_divided_equally_among_them() -> None:
    """The expected shares are the output of a projector whose linear layer computes the mean over the patches of a
    square.
    """
    shuffle = PixelShuffle(16, 16, factor=2)
    with torch.no_grad():
        shuffle.linear.weight.copy_(torch.eye(16).repeat(1, 4) / 4)
    expected = shuffle(torch.eye(16)[None])[0]
    assert torch.equal(project_shares(shuffle, torch.eye(16), []), expected)
    assert expected[0].nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_a_patch_that_nothing_attends_to_is_dark_and_a_patch_that_everything_attends_to_is_bright() -> None:
    maps = AttentionMaps(
        text="a dog",
        spans=((0, 1), (1, 3), (3, 5), (5, 5)),
        decoder_TLHN=torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [1, 0]])[:, None, None],
        rollout_NP=torch.tensor([[1.0, 0, 0, 0], [0, 0, 0.5, 0.5]]),
    )
    (first, a), (second, dog) = maps.words()
    assert (first, second) == ("a", "dog")
    assert a.tolist() == [[1, 0], [0, 0]]
    assert dog.tolist() == [[0.25, 0], [0.375, 0.375]]


def test_the_share_of_the_picture_is_the_attention_weight_of_its_features_without_losses_of_the_rollout() -> None:
    maps = AttentionMaps(
        text="a dog",
        spans=((0, 1), (1, 3), (3, 5)),
        decoder_TLHN=torch.tensor([[0.5, 0.1], [0.2, 0.2], [0.4, 0.0]])[:, None, None],
        rollout_NP=torch.full((2, 4), 0.1),  # the other 60 percent come from a class token
    )
    words, shares = zip(*maps.picture_shares(), strict=True)
    assert words == ("a", "dog")
    assert shares == pytest.approx((0.6, 0.4))


def test_the_panels_of_a_model_with_cross_attention_show_100_percent_for_each_word() -> None:
    model, tokenizer = tiny_model("looking")  # with a register and a resampler
    maps = attention_maps(model, tokenizer, *ask(model, tokenizer, "what is it"))
    panels = attention_panels(Image.new("RGB", (16, 16), "red"), model.config.image, maps, side=16)
    assert [panel.title for panel in panels[1:]] == ["a 100%", "dog 100%", "b 100%"]
