"""Vision transformers of timm (Wightman, 2019) with names such as `vit_*`, `deit_*` and `deit3_*`.

The encoders may have a class token, registers, layer scale, attention pooling or SwiGLU.

timm's config.json contains the name of an architecture, and the sizes of the architecture are in timm's code. The
shapes of the tensors determine most sizes. An import checks all other values against config.json or against the
architecture's name. If neither config.json nor the name contains a value, the import reports this value as unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlm.config import ModelConfig
from vlm.weights.accounting import tracked
from vlm.weights.config_fields import (
    UNKNOWN,
    ConfigField,
    Settings,
    constant,
    required,
    same,
    scalar,
    sides_of,
    standard_transformer,
    value_at,
    write_only,
)
from vlm.weights.family import Family
from vlm.weights.rules import Drop, Rule, WeightTable, position_table, rename

TRANSFORMER = "vision.transformer"
HEADS = f"{TRANSFORMER}.attention"
# Widths and names of architectures with 16 heads. All other architectures have heads of width 64.
WIDTHS_OF_16_HEADS = (1152, 1280, 1408, 1664)
NO_AXIS = "an architecture whose parts our encoder has"
MISSING_AXES = {
    r"sapiens2": "layer scale after attention only",
    r"_r\d*_s\d+_|_resnet\d+d_|_mci_": "a convolutional network before the blocks",
    r"_d(little|p?wee)_": "differential attention",
}
"""Dict from regular expressions of timm's architecture names to the part of the architecture that our encoder lacks."""
WHOLE_PATCHES = "squares of whole patches"
CROP_MODES = {"squash": "stretch", "center": "crop"}
"""Dict from a resize in timm to the value of our `image.resize`. The dict applies only if `crop_pct` is 1."""
NAMES_OF_16_HEADS = ("vit_base_patch16_gap_", "vit_giantopt_")


ROPE = r"_rope_(mixed_)?(ape_)?224|_pe_(core|lang|spatial)_"
EVA = r"_rope_reg\d|dinov3|lingbot"
"""Regular expressions of the names of architectures with rotary positions (`vlm.weights.tables.timm_eva`)."""
RELATIVE = r"_s?relpos_|_rpn_"
PARALLEL = r"_xp_|_pwee_"
BRANCHES = r"_\d+x2_"
"""Regular expressions of the names of architectures with unusual blocks (`vlm.weights.tables.timm_variants`)."""
OTHER_FAMILIES = "|".join((ROPE, EVA, RELATIVE, PARALLEL, BRANCHES))


def select_settings(settings: Settings) -> Settings | None:
    """Return the architecture's name and arguments from config.json, or None if the file belongs to another family."""
    name = str(settings.get("architecture", ""))
    other = re.search(OTHER_FAMILIES, name)
    return architecture_settings(settings) if name.startswith(("vit_", "deit_", "deit3_")) and not other else None


def selector(pattern: str) -> Callable[[Settings], Settings | None]:
    """Return a function that reads the settings of a `vit_*` architecture if the architecture's name matches
    `pattern`.
    """

    def select(settings: Settings) -> Settings | None:
        name = str(settings.get("architecture", ""))
        return architecture_settings(settings) if name.startswith("vit_") and re.search(pattern, name) else None

    return select


def by_name(path: str, value: Callable[[str], Any]) -> ConfigField:
    """Return the config field of a value that the name of the architecture implies."""
    return ConfigField(path, "architecture", value_at(path), lambda settings: value(settings["architecture"]))


def fields_except(*paths: str) -> tuple[ConfigField, ...]:
    """Return the config fields of family `timm`, except fields whose path or keys are in `paths`."""
    return tuple(field for field in FIELDS if not {field.path, field.keys} & {*paths} - {""})


def architecture_settings(settings: Settings) -> Settings:
    """Return the architecture's name and arguments from config.json."""
    given = {
        "architecture": str(settings["architecture"]),
        "embed_dim": settings.get("num_features") or UNKNOWN,
        "pretrained_cfg": settings.get("pretrained_cfg") or {},
    }
    return tracked(settings.get("model_args") or {}, given)


def num_heads(settings: Settings) -> Any:
    """Return the number of heads that the arguments contain, or that the architecture's name and width imply."""
    name, width = settings["architecture"], settings["embed_dim"]
    if "num_heads" in settings or width is UNKNOWN:
        return settings.get("num_heads", UNKNOWN)
    return 16 if width in WIDTHS_OF_16_HEADS or name.startswith(NAMES_OF_16_HEADS) else width // 64


def mlp_kind(settings: Settings) -> str:
    """Return the kind of the MLP that the architecture's name implies. Giant DINOv2 and TIPS models use SwiGLU."""
    return "gated" if re.fullmatch(r"vit_giant_patch14_.*(dinov2|tipsv2)", settings["architecture"]) else "plain"


def missing_axis(settings: Settings) -> str:
    """Return the architecture's name and the part that our encoder lacks, or NO_AXIS if our encoder has every part."""
    name = settings["architecture"]
    missing = next((axis for pattern, axis in MISSING_AXES.items() if re.search(pattern, name)), None)
    return NO_AXIS if missing is None else f"{name}, which has {missing}"


def activation(settings: Settings) -> Any:
    """Return the activation that the arguments contain or the architecture's name implies.

    The name of a SigLIP architecture does not imply an activation.
    """
    name = settings["architecture"]
    implied = "quick_gelu" if "quickgelu" in name else UNKNOWN if "siglip" in name else "gelu"
    implied = "silu" if mlp_kind(settings) == "gated" else implied
    return settings.get("act_layer", implied)


def pretrained_settings(config: ModelConfig) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`, with the picture preprocessing and the names of the first and last layers."""
    size = config.image.size
    mode = next((mode for mode, resize in CROP_MODES.items() if resize == config.image.resize), None)
    return {
        "input_size": [3, size, size],
        "interpolation": config.image.filter,
        **({"crop_pct": 1.0, "crop_mode": mode} if mode else {}),
        "mean": list(config.image.mean),
        "std": list(config.image.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def unwritten(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the picture settings that timm's `pretrained_cfg` cannot describe, as a dict from the reason to the
    settings.
    """
    if config.image.resize == "pad":
        return {"timm has no resize that fills the empty area with white": ("image.resize",)}
    if config.image.resize == "crop" and config.image.crop_start != "even":
        return {"timm rounds the position of a crop to the nearest even integer": ("image.crop_start",)}
    return {}


def mlp_ratio(config: ModelConfig) -> float:
    """Return a value for timm's setting `mlp_ratio`, so that int(width * mlp_ratio) is our MLP width."""
    width, mlp_width = config.vision.transformer.width, value_at(f"{TRANSFORMER}.mlp.mlp_width")(config)
    ratio = float(mlp_width / width)
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def has_either_bias_or_norm(config: ModelConfig) -> bool:
    """Return True if the stem has either a bias or a following norm, but not both, as in every encoder of timm."""
    return bool(value_at("vision.stem.bias")(config)) != config.vision.pre_norm


def in_arguments(field: ConfigField) -> ConfigField:
    """Return a copy of a config field whose value an export writes to the arguments of the architecture."""
    return replace(field, write=lambda value: {"model_args": field.write(value)})


ARGUMENTS = (
    same(f"{TRANSFORMER}.width", "embed_dim"),
    ConfigField(
        f"{HEADS}.num_heads", "num_heads", value_at(f"{HEADS}.num_heads"), num_heads, lambda value: {"num_heads": value}
    ),
    ConfigField(f"{HEADS}.num_kv_heads", "num_heads", value_at(f"{HEADS}.num_kv_heads"), num_heads),
    ConfigField(
        f"{TRANSFORMER}.mlp.activation",
        "act_layer",
        value_at(f"{TRANSFORMER}.mlp.activation"),
        activation,
        lambda value: {"act_layer": value},
    ),
    write_only("qkv_bias", value_at(f"{HEADS}.bias")),
    write_only("proj_bias", value_at(f"{HEADS}.has_out_bias")),
    write_only("depth", value_at(f"{TRANSFORMER}.depth")),
    write_only("patch_size", value_at("vision.stem.patch_size")),
    write_only("class_token", value_at("vision.class_token")),
    write_only("reg_tokens", value_at("vision.registers")),
    write_only("pre_norm", value_at("vision.pre_norm")),
    write_only("img_size", value_at("image.size")),
    write_only("mlp_ratio", mlp_ratio),
    write_only("init_values", value_at(f"{TRANSFORMER}.layer_scale")),
    write_only("no_embed_class", lambda config: config.vision.position_on == "patches"),
    write_only("final_norm", value_at("vision.post_norm")),
    write_only("fc_norm", lambda _: False),
    write_only("global_pool", lambda config: "map" if config.vision.select == "attention" else ""),
    write_only("num_classes", lambda _: 0),
)


def whole_patches(settings: Settings) -> str:
    """Return WHOLE_PATCHES if all picture sizes are squares of whole patches, or else describe the first wrong size."""
    named = re.search(r"patch(\d+)", settings["architecture"])
    patch = scalar(settings.get("patch_size") or (int(named[1]) if named else 1))
    sizes = (settings.get("img_size"), (settings.get("pretrained_cfg") or {}).get("input_size"))
    for size in sizes:
        sides = [] if size is None else sides_of(size)
        if not isinstance(patch, int) or len({*sides}) > 1 or any(side % patch for side in sides):
            return f"{size} pixels with patches of {patch} pixels"
    return WHOLE_PATCHES


def resize(settings: Settings) -> Any:
    """Return our name of timm's resize, or UNKNOWN if our config cannot describe the resize or config.json lacks it.

    timm scales a picture to 1 / crop_pct of the input's size before it crops the picture.
    """
    found = settings.get("pretrained_cfg") or {}
    mode, share = found.get("crop_mode") or "center", found.get("crop_pct")
    return CROP_MODES.get(mode, mode) if share == 1 else UNKNOWN


def preprocessing(key: str, ours: Callable[[ModelConfig], Any]) -> ConfigField:
    """Return the config field of a value of timm's `pretrained_cfg`, which may be missing in config.json."""

    def theirs(settings: Settings) -> Any:
        found = (settings.get("pretrained_cfg") or {}).get(key)
        return UNKNOWN if found is None else list(found)

    return ConfigField("", f"pretrained_cfg.{key}", ours, theirs)


FIELDS = (
    *(field for field in standard_transformer(TRANSFORMER) if field.path != f"{TRANSFORMER}.mlp.kind"),
    ConfigField(f"{TRANSFORMER}.mlp.kind", "architecture", value_at(f"{TRANSFORMER}.mlp.kind"), mlp_kind),
    ConfigField("", "architecture", lambda _: NO_AXIS, missing_axis),
    constant("vision.stem.kind", "patch"),
    ConfigField("either vision.stem.bias or vision.pre_norm", "", has_either_bias_or_norm, lambda _: True),
    ConfigField(
        f"{TRANSFORMER}.norm.eps",
        "architecture",
        value_at(f"{TRANSFORMER}.norm.eps"),
        lambda settings: 1e-5 if "_clip_" in settings["architecture"] else 1e-6,
        lambda value: {"architecture": "vit_base_patch16_clip_224" if value == 1e-5 else "vit_base_patch16_224"},
    ),
    *map(in_arguments, ARGUMENTS),
    write_only("num_features", value_at(f"{TRANSFORMER}.width")),
    write_only("pretrained_cfg", pretrained_settings),
    preprocessing("mean", lambda config: list(config.image.mean)),
    preprocessing("std", lambda config: list(config.image.std)),
    ConfigField(
        "image.filter",
        "pretrained_cfg.interpolation",
        value_at("image.filter"),
        lambda settings: (settings.get("pretrained_cfg") or {}).get("interpolation") or UNKNOWN,
    ),
    ConfigField(
        "image.resize",
        "pretrained_cfg.crop_mode",
        value_at("image.resize"),
        resize,
        condition="pretrained_cfg.crop_mode is compared only if crop_pct is 1",
    ),
    ConfigField(
        "image.crop_start",
        "pretrained_cfg.crop_mode",
        lambda config: config.image.crop_start if config.image.resize == "crop" else "even",
        lambda settings: UNKNOWN if resize(settings) is UNKNOWN else "even",
    ),
    ConfigField("", "img_size, patch_size, pretrained_cfg.input_size", lambda _: WHOLE_PATCHES, whole_patches),
    required("in_chans", 3),
    required("pos_embed", "learn"),
    required("qk_norm", False),
    required("scale_attn_norm", False),
    required("scale_mlp_norm", False),
    required("dynamic_img_pad", False),
    required("pool_include_prefix", False),
)
WITHOUT_EFFECT = {
    "model_args.*drop*": "is used only while a model is trained; runs set their own value",
    **dict.fromkeys(
        ("model_args.weight_init", "model_args.fix_init", "model_args.dynamic_img_size", "model_args.strict_img_size"),
        "does not change the numbers that the model computes",
    ),
    **dict.fromkeys(
        ("/num_classes", "/global_pool", "label_names", "label_descriptions.*"),
        "belongs to a classifier, which is not imported",
    ),
    "pretrained_cfg.*": "describes the file, or preprocessing that the model config cannot describe",
}


def table(config: ModelConfig) -> WeightTable:
    """Return the weight table of the encoder."""
    vision = config.vision
    extra = vision.class_token + vision.registers if vision.position_on == "all" else 0
    return WeightTable(
        rules=(
            rename("patch_embed.proj.*", "encoder.stem.*"),
            rename("cls_token", "encoder.class_token"),
            rename("reg_token", "encoder.registers"),
            position_table(rename("pos_embed", "encoder.position"), extra=extra),
            rename("norm_pre.*", "encoder.pre_norm.*"),
            rename("blocks.{i}.norm1.*", "encoder.blocks.{i}.attention_norm.*"),
            rename("blocks.{i}.attn.qkv.*", "encoder.blocks.{i}.attention.qkv.*"),
            rename("blocks.{i}.attn.proj.*", "encoder.blocks.{i}.attention.out.*"),
            rename("blocks.{i}.ls1.gamma", "encoder.blocks.{i}.attention_scale"),
            rename("blocks.{i}.norm2.*", "encoder.blocks.{i}.mlp_norm.*"),
            rename("blocks.{i}.mlp.fc1.*", "encoder.blocks.{i}.mlp.up.*"),
            rename("blocks.{i}.mlp.fc1.*", "encoder.blocks.{i}.mlp.gate_up.*"),
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
            Drop("fc_norm.*", "the norm of the pooled mean, used for classification"),
            Drop("head.*", "the head of a classifier"),
            Drop("head_dist.*", "the head of a classifier"),
            Drop("attn_pool.*", "the attention pooling, because vision.select of the model is not attention"),
        ),
    )


def with_rules(shared: WeightTable, own: Sequence[Rule], *drops: Drop) -> WeightTable:
    """Return a weight table with the rules `own`. For parameters without a rule in `own`, the table has the rules of
    `shared`.
    """
    replaced = {name.replace("*", kind) for rule in own for name in rule.ours for kind in ("weight", "bias")}
    kept = [rule for rule in shared.rules if rule.ours[0].replace("*", "weight") not in replaced]
    return WeightTable((*kept, *own), (*shared.drops, *drops))


FAMILIES = (
    Family(
        "timm",
        "encoder",
        select_settings,
        FIELDS,
        table,
        fixed_settings={},
        without_effect=WITHOUT_EFFECT,
        image_processor=None,
        unwritten=unwritten,
        # DeiT's distillation token becomes a register: the blocks read the token, but the encoder's output does not
        # contain it.
        legacy_prefixes=(("dist_token", "reg_token"),),
    ),
)
