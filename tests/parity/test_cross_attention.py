"""Our resampler, gated cross-attention and pixel shuffle give the outputs of Idefics, an open version of Flamingo."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Idefics3Config, IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from vlm.config import ModelConfig
from vlm.factory import build_model
from vlm.model import VisionLanguageModel
from vlm.projector import PixelShuffle
from vlm.text.base import SLOT

WIDTH, LATENTS, VOCAB = 24, 3, 40
MARKER = 7
"""Id of the image token that marks the position of a picture in an Idefics sequence."""


def theirs() -> IdeficsForVisionText2Text:
    torch.manual_seed(0)
    config = IdeficsConfig(
        vocab_size=VOCAB,
        additional_vocab_size=0,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=False,
        use_resampler=True,
        alpha_initializer="ones",
        alpha_type="float",
        vision_config={
            "embed_dim": WIDTH,
            "image_size": 16,
            "patch_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": False,
        },
        initializer_range=0.2,
    )
    model = IdeficsForVisionText2Text(config)
    model.train(False)
    return model


def ours() -> VisionLanguageModel:
    attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6}
    config = ModelConfig.model_validate(
        {
            "image": {"size": 16},
            "text": {"kind": "bpe", "vocab_size": 300},
            "vision": {
                "stem": {"kind": "patch", "patch_size": 8},
                "transformer": {
                    "width": WIDTH,
                    "depth": 1,
                    "attention": attention,
                    "mlp": {"kind": "plain", "mlp_width": 32},
                },
            },
            "projector": {
                "kind": "resampler",
                "num_latents": LATENTS,
                "depth": 2,
                "num_heads": 2,
                "head_dim": 8,
                "mlp": {"kind": "plain", "mlp_width": 4 * WIDTH, "activation": "relu", "bias": False},
            },
            "decoder": {
                "context": 64,
                "transformer": {
                    "width": WIDTH,
                    "depth": 4,
                    "attention": attention,
                    "mlp": {"kind": "gated", "mlp_width": 48},
                    "norm": {"kind": "rms", "eps": 1e-6},
                    "position": {"kind": "rotary"},
                },
            },
            "fusion": {
                "kind": "cross_attention",
                "every": 2,
                "num_heads": 4,
                "head_dim": 6,
                "mlp": {"kind": "gated", "mlp_width": 48},
            },
            "generation": {"max_new_tokens": 8},
        }
    )
    return build_model(config, VOCAB).eval()


def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    module.load_state_dict(values, strict=True)


def copy_resampler(mine: nn.Module, original: nn.Module) -> None:
    """Copy the weights of Idefics' resampler. Idefics has no output layer, so our output layer becomes the identity."""
    state = original.state_dict()
    values = {"latents": state["latents"], "out.weight": torch.eye(WIDTH), "out.bias": torch.zeros(WIDTH)}
    values |= {f"norm.{end}": state[f"layer_norm.{end}"] for end in ("weight", "bias")}
    for i in range(2):
        attention, mlp, block = f"blocks.{i}.0", f"blocks.{i}.1", f"blocks.{i}"
        values[f"{block}.attention.q.weight"] = state[f"{attention}.q_proj.weight"]
        keys_values = [state[f"{attention}.{name}_proj.weight"] for name in ("k", "v")]
        values[f"{block}.attention.kv.weight"] = torch.cat(keys_values)
        values[f"{block}.attention.out.weight"] = state[f"{attention}.output_proj.weight"]
        values[f"{block}.mlp.up.weight"] = state[f"{mlp}.fc.weight"]
        values[f"{block}.mlp.out.weight"] = state[f"{mlp}.c_proj.weight"]
        for end in ("weight", "bias"):
            values[f"{block}.memory_norm.{end}"] = state[f"{attention}.context_layer_norm.{end}"]
            values[f"{block}.attention_norm.{end}"] = state[f"{attention}.latents_layer_norm.{end}"]
            values[f"{block}.mlp_norm.{end}"] = state[f"{mlp}.ln.{end}"]
    fill(mine, values)


def copy_decoder(mine: nn.Module, original: IdeficsForVisionText2Text) -> None:
    state = {name.removeprefix("model."): value for name, value in original.state_dict().items()}
    values = {
        "tokens.weight": state["embed_tokens.weight"],
        "norm.weight": state["norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for i in range(4):
        layer, block = f"layers.{i}", f"blocks.{i}"
        qkv = [state[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        values[f"{block}.attention.qkv.weight"] = torch.cat(qkv)
        values[f"{block}.attention.out.weight"] = state[f"{layer}.self_attn.o_proj.weight"]
        values |= shared(state, layer, block)
    for i in range(2):
        layer, block = f"gated_cross_attn_layers.{i}", f"cross_blocks.{i}"
        values[f"{block}.attention.q.weight"] = state[f"{layer}.cross_attn.q_proj.weight"]
        values[f"{block}.attention.kv.weight"] = torch.cat([state[f"{layer}.cross_attn.{n}_proj.weight"] for n in "kv"])
        values[f"{block}.attention.out.weight"] = state[f"{layer}.cross_attn.o_proj.weight"]
        values[f"{block}.attention_gate"] = state[f"{layer}.alpha_cross_attn"]
        values[f"{block}.mlp_gate"] = state[f"{layer}.alpha_dense"]
        values |= shared(state, layer, block)
    fill(mine, values)


def shared(state: dict[str, Tensor], layer: str, block: str) -> dict[str, Tensor]:
    """Return the weights of the norms and the gated MLP, which decoder blocks and gated blocks both have."""
    return {
        f"{block}.attention_norm.weight": state[f"{layer}.input_layernorm.weight"],
        f"{block}.mlp_norm.weight": state[f"{layer}.post_attention_layernorm.weight"],
        f"{block}.mlp.gate_up.weight": torch.cat([state[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up")]),
        f"{block}.mlp.out.weight": state[f"{layer}.mlp.down_proj.weight"],
    }


@pytest.mark.parametrize("patches", [4, 9])
def test_resampler_gives_the_outputs_of_the_idefics_resampler(patches: int) -> None:
    original, model = theirs().model.perceiver_resampler, ours()
    assert isinstance(original, IdeficsPerceiverResampler)
    copy_resampler(model.projector, original)
    x_BNW = torch.randn(2, patches, WIDTH)
    torch.testing.assert_close(model.projector(x_BNW), original(x_BNW), atol=1e-5, rtol=0)


# Positions of the pictures in each of the four rows of a batch. Row 0 has text between two pictures, row 1 begins with
# a picture, row 2 has a picture near its end, and row 3 has two neighbouring pictures.
ROWS = ([0, 3], [0], [5], [0, 1])


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:3]])
def test_cross_attention_to_pictures_between_texts_gives_the_same_logits_as_idefics(
    rows: tuple[list[int], ...],
) -> None:
    original, model = theirs(), ours()
    copy_decoder(model.decoder, original)
    T, most = 8, max(len(positions) for positions in rows)
    tokens_BT = torch.randint(8, VOCAB, (len(rows), T))
    for row, positions in enumerate(rows):
        tokens_BT[row, positions] = MARKER
    features_PNW = torch.randn(sum(map(len, rows)), LATENTS, WIDTH)
    padded = torch.zeros(len(rows), most, LATENTS, WIDTH)
    mask_BTM = torch.zeros(len(rows), T, most, dtype=torch.long)
    features = iter(features_PNW)
    for row, positions in enumerate(rows):
        for number, position in enumerate(positions):
            padded[row, number] = next(features)
            mask_BTM[row, position : [*positions, T][number + 1], number] = 1
    with torch.inference_mode():
        expected = original(input_ids=tokens_BT, perceiver_embeddings=padded, image_attention_mask=mask_BTM).logits
        model.fusion.marker.copy_(model.decoder.tokens.weight[MARKER])  # type: ignore[operator]
        x_BTW, media = model.embed(tokens_BT.masked_fill(tokens_BT == MARKER, SLOT), features_PNW)
        logits = model.decoder.logits(model.decoder(x_BTW, mask=None, media=media))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_gives_the_outputs_of_the_idefics_3_pixel_shuffle(factor: int) -> None:
    config = Idefics3Config(
        scale_factor=factor,
        vision_config={"hidden_size": 8, "num_attention_heads": 4},
        text_config={"hidden_size": WIDTH, "num_attention_heads": 4, "pad_token_id": 0},
    )
    original: nn.Module = Idefics3Connector(config)
    mine = PixelShuffle(8, WIDTH, factor)
    fill(mine, {"linear.weight": original.state_dict()["modality_projection.proj.weight"]})
    x_BNW = torch.randn(2, 36, 8)
    torch.testing.assert_close(mine(x_BNW), original(x_BNW), atol=1e-5, rtol=0)


def test_cross_attention_with_gates_at_zero_does_not_change_the_decoder_logits() -> None:
    model, tokens = ours(), torch.tensor([[SLOT, 1, 2, 3]])
    with torch.inference_mode():
        one, two = (
            model.decoder(*args[:1], mask=None, media=args[1])
            for args in (model.embed(tokens, torch.randn(1, LATENTS, WIDTH)) for _ in range(2))
        )
    assert torch.equal(one, two)
    assert F.mse_loss(one, one.roll(1, 1)) > 0
