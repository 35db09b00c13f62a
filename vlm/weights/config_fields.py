"""Mapping between our model config and another library's config.json.

A `ConfigField` reads one value from our config and from config.json, and converts our value to settings of config.json.
Import and export use the same list of fields: an import compares config.json with our config, and an export writes
config.json from our config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.config import AttentionConfig, ModelConfig
from vlm.weights.accounting import tracked

Settings = Mapping[str, Any]
"""Content of a published config.json, or content of one of its sections."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Dict from the name of an activation function in transformers to our name of the function.

If this dict has several names for one function, an export writes the first of these names.
"""


VISION_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
"""Sizes of ViT, CLIP and SigLIP encoders that transformers assumes if config.json does not contain the sizes."""


class Unknown:
    """Type of UNKNOWN."""


UNKNOWN = Unknown()
"""Marker of a value that an import does not compare. The usual reason is that config.json does not contain the setting,
and that the other library has no default for the setting.
"""


@dataclass(frozen=True)
class ConfigField:
    """One value that both our config and the other library's config.json determine.

    Attributes:
        path: dotted path of the value in our config, for error messages. The path is empty for a field of `write_only`,
            and for a value that our config lacks because Lakesight supports only one value.
        keys: keys of the value in config.json, for error messages; empty if the family implies the value.
        ours: function that reads our value from the model's config.
        theirs: function that reads the same value from the settings of config.json, after defaults are filled in. The
            function returns UNKNOWN if the settings do not contain the value, or if an import does not compare the
            value.
        write: function that converts our value to the settings that an export writes to config.json.
        condition: text for the report of an import, which says under which condition config.json determines the value.
            The text is empty if config.json determines the value whenever the key exists.
    """

    path: str
    keys: str
    ours: Callable[[ModelConfig], Any]
    theirs: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]] = lambda _: {}
    condition: str = ""


def same(path: str, key: str, values: Mapping[str, str] | None = None) -> ConfigField:
    """Return the config field of a value that is at `path` in our config and at `key` in config.json.

    Args:
        path: dotted path of the value in our config.
        key: key of the value in config.json.
        values: dict from the name of a value in config.json to our name of the value, or None if both names are equal.
    """
    to_ours = values or {}
    to_theirs = {ours: theirs for theirs, ours in reversed(list(to_ours.items()))}

    def theirs(settings: Settings) -> Any:
        value = settings.get(key, UNKNOWN)
        return to_ours.get(value, value) if isinstance(value, str) else value

    def write(value: Any) -> dict[str, Any]:
        return {key: to_theirs.get(value, value) if isinstance(value, str) else value}

    return ConfigField(path, key, value_at(path), theirs, write)


def constant(path: str, value: Any) -> ConfigField:
    """Return the config field of a value that all models of a family share and that config.json does not contain."""
    return ConfigField(path, "", value_at(path), lambda _: value)


def required(key: str, value: Any) -> ConfigField:
    """Return the config field of a setting in config.json for which Lakesight supports only one value.

    A null in config.json means that the setting is not set.
    """

    def theirs(settings: Settings) -> Any:
        found = settings.get(key)
        return value if found is None else found

    return ConfigField("", key, lambda _: value, theirs)


def square_picture(size: str, patch: str) -> ConfigField:
    """Return the config field which requires a square picture that consists of whole patches.

    An import can resample positions to another size, so the size itself need not be the same.

    Args:
        size: key of the picture's size in config.json; the value is one number, or height and width.
        patch: key of the patch's size in config.json.
    """
    supported = "a square of whole patches"

    def theirs(settings: Settings) -> Any:
        if size not in settings:
            return UNKNOWN
        sides, patches = sides_of(settings[size]), sides_of(settings.get(patch, 1))
        fits = len({*sides}) == len({*patches}) == 1 and sides[0] > 0 and sides[0] % patches[0] == 0
        return supported if fits else f"{settings[size]} pixels with patches of {settings.get(patch)} pixels"

    return ConfigField("", f"{size}, {patch}", lambda _: supported, theirs)


def sides_of(size: Any) -> list[int]:
    """Return the sides of a picture or patch, given as a number, (height, width) or (channels, height, width)."""
    return [int(side) for side in size[-2:]] if isinstance(size, list | tuple) else [int(size)]


def scalar(value: Any) -> Any:
    """Return one number for a size that is given as two equal numbers, and return any other value unchanged."""
    if isinstance(value, list | tuple) and len({*value}) == 1:
        return value[0]
    return value


def write_only(key: str, ours: Callable[[ModelConfig], Any]) -> ConfigField:
    """Return a config field that an export writes and an import does not compare.

    Use this function in two cases: if the names or shapes of the tensors already determine the setting, or if the value
    in config.json may differ from the value in our config. The import still reads the key, so that the key is not
    refused as unknown.
    """

    def theirs(settings: Settings) -> Any:
        settings.get(key)
        return UNKNOWN

    return ConfigField("", key, ours, theirs, lambda value: {key: value})


def attention_biases(path: str, qkv: ConfigField, out: bool | None = None) -> tuple[ConfigField, ...]:
    """Return the config fields of the attention biases.

    Args:
        path: dotted path of our attention config.
        qkv: config field which says whether queries, keys and values have a bias.
        out: True if all models of the family have an output bias, or False if no model has an output bias. None means
            that a model has an output bias if and only if queries, keys and values have a bias.
    """
    return (
        qkv,
        ConfigField(
            f"{path}.out_bias", qkv.keys, value_at(f"{path}.has_out_bias"), qkv.theirs if out is None else lambda _: out
        ),
    )


def attention_heads(path: str, width: str, count: str) -> tuple[ConfigField, ...]:
    """Return the config fields of multi-head attention in which the model's width is split evenly over the heads.

    Args:
        path: dotted path of our attention config.
        width: key of the model's width in config.json.
        count: key of the number of heads in config.json.
    """
    return (
        same(f"{path}.num_heads", count),
        ConfigField(f"{path}.num_kv_heads", count, value_at(f"{path}.num_kv_heads"), lambda settings: settings[count]),
        ConfigField(
            f"{path}.head_dim",
            f"{width} / {count}",
            value_at(f"{path}.head_dim"),
            lambda settings: settings[width] / settings[count],
        ),
    )


def standard_transformer(path: str) -> tuple[ConfigField, ...]:
    """Return the config fields that GPT-2 and ViT share, for example for LayerNorm and learned positions."""
    return (
        constant(f"{path}.norm.kind", "layer"),
        constant(f"{path}.position.kind", "learned"),
        constant(f"{path}.mlp.kind", "plain"),
        constant(f"{path}.mlp.bias", True),
        constant(f"{path}.sandwich", False),
        *sequential_pre_norm(path),
        constant(f"{path}.attention.soft_cap", None),
        constant(f"{path}.attention.windows", (None,)),
        default_attention_scale(path),
    )


def sequential_pre_norm(path: str) -> tuple[ConfigField, ...]:
    """Return the config fields which require the usual block: norm and attention, then norm and MLP. In the usual
    block, queries and keys have no norms.
    """
    return (
        constant(f"{path}.input_norms", True),
        constant(f"{path}.parallel", False),
        constant(f"{path}.attention.qk_norm", False),
    )


def vision_transformer() -> tuple[ConfigField, ...]:
    """Return the config fields of a vision transformer whose keys are the same for ViT, CLIP and SigLIP."""
    path = "vision.transformer"
    return (
        *standard_transformer(path),
        constant("vision.stem.kind", "patch"),
        constant("vision.registers", 0),
        constant(f"{path}.layer_scale", None),
        same(f"{path}.width", "hidden_size"),
        same(f"{path}.depth", "num_hidden_layers"),
        *attention_heads(f"{path}.attention", "hidden_size", "num_attention_heads"),
        same(f"{path}.mlp.mlp_width", "intermediate_size"),
        same(f"{path}.mlp.activation", "hidden_act", ACTIVATIONS),
        same(f"{path}.norm.eps", "layer_norm_eps"),
        ConfigField(
            "vision.stem.patch_size",
            "patch_size",
            value_at("vision.stem.patch_size"),
            lambda settings: scalar(settings.get("patch_size", UNKNOWN)),
            lambda value: {"patch_size": value},
        ),
        square_picture("image_size", "patch_size"),
        required("num_channels", 3),
        *default_options(),
    )


def default_options() -> tuple[ConfigField, ...]:
    """Return the config fields of the general options of transformers for which Lakesight supports only the default."""
    return (
        required("is_encoder_decoder", False),
        required("is_decoder", False),
        required("tie_encoder_decoder", False),
        required("add_cross_attention", False),
        required("pruned_heads", {}),
    )


def default_attention_scale(path: str) -> ConfigField:
    """Return the config field which requires that attention scores are divided by sqrt(head_dim)."""
    return ConfigField(
        f"{path}.attention.scale * sqrt(head_dim)",
        "",
        lambda config: (
            attention_scale(value_at(f"{path}.attention")(config))
            * value_at(f"{path}.attention.head_dim")(config) ** 0.5
        ),
        lambda _: 1.0,
    )


def attention_scale(attention: AttentionConfig) -> float:
    """Return the factor by which the model multiplies attention scores."""
    return attention.scale if attention.scale is not None else attention.head_dim**-0.5


def in_section(section: str, fields: Iterable[ConfigField], defaults: Settings) -> tuple[ConfigField, ...]:
    """Copy config fields so that the copies read and write one section of config.json, and return the copies.

    Args:
        section: key of the section.
        fields: config fields whose keys are relative to the section.
        defaults: values that an import assumes for keys that are missing in the section.
    """
    return tuple(_in_section(section, field, defaults) for field in fields)


def _in_section(section: str, field: ConfigField, defaults: Settings) -> ConfigField:
    return ConfigField(
        field.path,
        field.keys and f"{section}.{field.keys}",
        field.ours,
        lambda settings: field.theirs(tracked(settings.get(section) or {}, defaults)),
        lambda value: {section: field.write(value)},
    )


def value_at(path: str) -> Callable[[ModelConfig], Any]:
    """Return a function that reads the value at a dotted path of a model config.

    The returned function returns None for a path that a model config lacks, such as a key of an unused `kind`.
    """

    def read(config: ModelConfig) -> Any:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name, None)
        return value

    return read


# ------------------------------------------------------------------------------------------------ compare and write


def find_mismatches(fields: Iterable[ConfigField], config: ModelConfig, settings: Settings) -> list[str]:
    """Return one sentence for each field whose value in our config differs from its value in config.json."""
    sentences = []
    for field in fields:
        ours, theirs = field.ours(config), field.theirs(settings)
        if theirs is not UNKNOWN and not _equal(ours, theirs):
            sentences.append(_mismatch(field, ours, theirs))
    return sentences


def _mismatch(field: ConfigField, ours: Any, theirs: Any) -> str:
    if not field.path:
        return f"{field.keys} in config.json is {theirs!r}, and this import needs {ours!r}"
    source = f"{field.keys} in config.json gives" if field.keys else "weights of this family have"
    return f"{field.path}: {source} {theirs!r}, the model has {ours!r}"


def unchecked_paths(fields: Iterable[ConfigField], settings: Settings) -> list[str]:
    """Return the paths of our config values that an import cannot compare, because config.json lacks the setting."""
    unknown = [field for field in fields if field.path and field.theirs(settings) is UNKNOWN]
    return [f"{field.path} ({field.condition})" if field.condition else field.path for field in unknown]


def build_settings(fields: Iterable[ConfigField], config: ModelConfig) -> dict[str, Any]:
    """Convert our config to the settings that an export writes to config.json, and return the settings."""
    settings: dict[str, Any] = {}
    for field in fields:
        merge_settings(settings, field.write(field.ours(config)))
    return settings


def merge_settings(into: dict[str, Any], new: Settings) -> None:
    """Merge the settings `new` into the settings `into`, in place and recursively."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge_settings(into[key], value)
        else:
            into[key] = value


def _equal(one: Any, other: Any) -> bool:
    """Return True if two values are equal, apart from the rounding error of numbers in decimal notation."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else bool(one == other)
