"""timm's vision transformers (Wightman, 2019): `vit_*` with class token, registers, layer scale or attention pooling.

timm's config.json names an architecture, whose sizes are in timm's code. Most of them show in the tensors. What does
not is compared where the file spells it out or the name implies it, and is said to be unchecked where neither does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm.config import ModelConfig
from vlm.weights.facts import UNTOLD, Fact, Settings, always, at, classic, same, tell
from vlm.weights.family import Family
from vlm.weights.rules import Drop, Table, on_grid, rename

TRANSFORMER = "vision.transformer"
HEADS = f"{TRANSFORMER}.attention"
# Architectures whose heads are not 64 wide: these widths, and these names.
SIXTEEN_HEADS = (1152, 1280, 1408, 1664)
SIXTEEN_HEADS_NAMED = ("vit_base_patch16_gap_", "vit_giantopt_")


def settings_of(settings: Settings) -> Settings | None:
    """The arguments that a file spells out, beside the architecture's name; None where it is not one of these."""
    name = str(settings.get("architecture", ""))
    if not name.startswith("vit_"):
        return None
    given = {"architecture": name, "embed_dim": settings.get("num_features") or UNTOLD}
    return {**given, **settings.get("model_args", {})}


def num_heads(settings: Settings) -> Any:
    """Heads, as spelled out or as the name and the width imply."""
    name, width = settings["architecture"], settings["embed_dim"]
    if "num_heads" in settings or width is UNTOLD:
        return settings.get("num_heads", UNTOLD)
    return 16 if width in SIXTEEN_HEADS or name.startswith(SIXTEEN_HEADS_NAMED) else width // 64


def activation(settings: Settings) -> Any:
    """The activation, as spelled out or as the name implies; the name of a SigLIP implies neither of two."""
    name = settings["architecture"]
    implied = "quick_gelu" if "quickgelu" in name else UNTOLD if "siglip" in name else "gelu"
    return settings.get("act_layer", implied)


def pictures(config: ModelConfig) -> dict[str, Any]:
    """How pictures come in."""
    size = config.image.size
    return {
        "input_size": [3, size, size],
        "mean": list(config.image.mean),
        "std": list(config.image.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def mlp_ratio(config: ModelConfig) -> float:
    """The ratio whose product with the width, cut off as timm does, is the width of our MLP."""
    width, mlp_width = config.vision.transformer.width, at(f"{TRANSFORMER}.mlp.mlp_width")(config)
    ratio = float(mlp_width / width)
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def bare_stem(config: ModelConfig) -> bool:
    """timm leaves the stem's bias out where a norm follows, and only there."""
    return bool(at("vision.stem.bias")(config)) != config.vision.pre_norm


def in_arguments(fact: Fact) -> Fact:
    """A fact that is written among the arguments of the architecture."""
    return replace(fact, write=lambda value: {"model_args": fact.write(value)})


ARGUMENTS = (
    same(f"{TRANSFORMER}.width", "embed_dim"),
    Fact(f"{HEADS}.num_heads", "num_heads", at(f"{HEADS}.num_heads"), num_heads, lambda value: {"num_heads": value}),
    Fact(f"{HEADS}.num_kv_heads", "num_heads", at(f"{HEADS}.num_kv_heads"), num_heads),
    Fact(
        f"{TRANSFORMER}.mlp.activation",
        "act_layer",
        at(f"{TRANSFORMER}.mlp.activation"),
        activation,
        lambda value: {"act_layer": value},
    ),
    tell("depth", at(f"{TRANSFORMER}.depth")),
    tell("patch_size", at("vision.stem.patch_size")),
    tell("class_token", at("vision.class_token")),
    tell("reg_tokens", at("vision.registers")),
    tell("pre_norm", at("vision.pre_norm")),
    tell("img_size", at("image.size")),
    tell("mlp_ratio", mlp_ratio),
    tell("init_values", at(f"{TRANSFORMER}.layer_scale")),
    tell("no_embed_class", lambda config: config.vision.position_on == "patches"),
    tell("final_norm", at("vision.post_norm")),
    tell("fc_norm", lambda _: False),
    tell("global_pool", lambda config: "map" if config.vision.select == "attention" else ""),
    tell("num_classes", lambda _: 0),
)
FACTS = (
    *classic(TRANSFORMER),
    always("vision.stem.kind", "patch"),
    always(f"{HEADS}.bias", True),
    Fact("vision.stem.bias without vision.pre_norm, or the reverse", "", bare_stem, lambda _: True),
    Fact(
        f"{TRANSFORMER}.norm.eps",
        "architecture",
        at(f"{TRANSFORMER}.norm.eps"),
        lambda settings: 1e-5 if "_clip_" in settings["architecture"] else 1e-6,
        lambda value: {"architecture": "vit_base_patch16_clip_224" if value == 1e-5 else "vit_base_patch16_224"},
    ),
    Fact(
        "norms in front of the branches",
        "architecture",
        lambda _: True,
        lambda settings: "_rpn_" not in settings["architecture"],
    ),
    *map(in_arguments, ARGUMENTS),
    tell("num_features", at(f"{TRANSFORMER}.width")),
    tell("pretrained_cfg", pictures),
)


def table(config: ModelConfig) -> Table:
    """Names of the file and of the encoder."""
    vision = config.vision
    extra = vision.class_token + vision.registers if vision.position_on == "all" else 0
    return Table(
        rules=(
            rename("patch_embed.proj.*", "encoder.stem.*"),
            rename("cls_token", "encoder.class_token"),
            rename("reg_token", "encoder.registers"),
            on_grid(rename("pos_embed", "encoder.position"), extra=extra),
            rename("norm_pre.*", "encoder.pre_norm.*"),
            rename("blocks.{i}.norm1.*", "encoder.blocks.{i}.attention_norm.*"),
            rename("blocks.{i}.attn.qkv.*", "encoder.blocks.{i}.attention.qkv.*"),
            rename("blocks.{i}.attn.proj.*", "encoder.blocks.{i}.attention.out.*"),
            rename("blocks.{i}.ls1.gamma", "encoder.blocks.{i}.attention_scale"),
            rename("blocks.{i}.norm2.*", "encoder.blocks.{i}.mlp_norm.*"),
            rename("blocks.{i}.mlp.fc1.*", "encoder.blocks.{i}.mlp.up.*"),
            rename("blocks.{i}.mlp.fc2.*", "encoder.blocks.{i}.mlp.out.*"),
            rename("blocks.{i}.ls2.gamma", "encoder.blocks.{i}.mlp_scale"),
            rename("norm.*", "encoder.norm.*"),
            rename("attn_pool.latent", "encoder.pool.query"),
            rename("attn_pool.q.*", "encoder.pool.attention.q.*"),
            rename("attn_pool.kv.*", "encoder.pool.attention.kv.*"),
            rename("attn_pool.proj.*", "encoder.pool.attention.out.*"),
            rename("attn_pool.norm.*", "encoder.pool.norm.*"),
            rename("attn_pool.mlp.fc1.*", "encoder.pool.mlp.up.*"),
            rename("attn_pool.mlp.fc2.*", "encoder.pool.mlp.out.*"),
        ),
        drops=(
            Drop("fc_norm.*", "the norm of the mean, for classifying"),
            Drop("head.*", "the head of a classifier"),
            Drop("attn_pool.*", "the pooling query: the model's select is not attention"),
        ),
    )


FAMILIES = (Family("timm", "encoder", settings_of, FACTS, table, header={}),)
