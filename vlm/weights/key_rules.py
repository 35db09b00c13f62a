"""Rules for the values of keys in the JSON files of a published folder.

CONFIG_RULES has the rules for config.json. These rules say only which type a value must have, and in which range the
value must be. In any other file, such as preprocessor_config.json, a key must have a rule or a reason why the key has
no effect. A key without a rule and without a reason is refused. A value that the rule of its key does not support is
also refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.config import Config
from vlm.weights.accounting import reason_without_effect


class FileReport(Config):
    """Keys of a JSON file next to config.json, in two groups.

    Attributes:
        file: name of the file.
        used: keys that the import has compared with the model's config, or from which the import has derived the
            config.
        without_effect: keys that have no effect, as a dict from the reason to the keys.
    """

    file: str
    used: tuple[str, ...]
    without_effect: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class KeyRule:
    """Values that Lakesight supports for one key.

    Attributes:
        needs: the supported values in words, for error messages.
        supports: function that returns True for a supported value.
    """

    needs: str
    supports: Callable[[Any], bool]


def only(*values: Any) -> KeyRule:
    """Return the rule that supports exactly the given values. True and 1 are different values, and so are 1 and "1"."""

    def supports(value: Any) -> bool:
        return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)

    return KeyRule(" or ".join(repr(value) for value in values), supports)


def number(needs: str, supports: Callable[[float], bool], *, whole: bool = False) -> KeyRule:
    """Return the rule that supports finite numbers for which `supports` returns True.

    Args:
        needs: the supported numbers in words.
        supports: function that returns True for a supported number.
        whole: whether only integers are supported.
    """
    types = int if whole else (int, float)

    def check(value: Any) -> bool:
        return isinstance(value, types) and not isinstance(value, bool) and _is_finite(value) and supports(value)

    return KeyRule(needs, check)


def _is_finite(value: float) -> bool:
    """Return True if a number is finite and is not too large for a floating-point number."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def or_null(rule: KeyRule) -> KeyRule:
    """Return the rule that supports null and all values that `rule` supports."""
    return KeyRule(f"{rule.needs}, or null", lambda value: value is None or rule.supports(value))


LARGEST_SIZE = 2**31 - 1
SIZE = number(f"an integer from 1 to {LARGEST_SIZE}", lambda value: 0 < value <= LARGEST_SIZE, whole=True)
COUNT = number(f"an integer from 0 to {LARGEST_SIZE}", lambda value: 0 <= value <= LARGEST_SIZE, whole=True)
POSITIVE = number("a number above 0", lambda value: value > 0)
SWITCH = KeyRule("true or false", lambda value: isinstance(value, bool))
TEXT = KeyRule("a text", lambda value: isinstance(value, str))
OBJECT = KeyRule("an object", lambda value: isinstance(value, Mapping))
SIDES = KeyRule(
    "an integer above 0, or a list of two or three such integers",
    lambda value: (
        SIZE.supports(value)
        or (isinstance(value, list | tuple) and len(value) in (2, 3) and all(map(SIZE.supports, value)))
    ),
)
LAYER_TYPES = KeyRule(
    "a list of 'full_attention' and 'sliding_attention'",
    lambda value: isinstance(value, list) and all(each in ("full_attention", "sliding_attention") for each in value),
)
THREE_NUMBERS = KeyRule(
    "three numbers",
    lambda value: (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(number("", lambda _: True).supports(each) for each in value)
    ),
)

CONFIG_RULES: dict[str, KeyRule] = {
    **dict.fromkeys(
        (
            "depth", "embed_dim", "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "n_embd",
            "n_head", "n_layer", "n_positions", "num_attention_heads", "num_features", "num_heads",
            "num_hidden_layers", "num_key_value_heads", "num_patches", "projection_dim", "rel_pos_dim", "vocab_size",
        ),
        SIZE,
    ),
    **dict.fromkeys(("in_chans", "n_inner", "num_channels", "sliding_window"), or_null(SIZE)),
    **dict.fromkeys(("num_classes", "reg_tokens"), COUNT),
    **dict.fromkeys(
        ("layer_norm_eps", "layer_norm_epsilon", "mlp_ratio", "query_pre_attn_scalar", "rms_norm_eps"), POSITIVE
    ),
    **dict.fromkeys(
        ("attn_logit_softcapping", "crop_pct", "final_logit_softcapping", "init_values", "rope_theta"),
        or_null(POSITIVE),
    ),
    **dict.fromkeys(
        (
            "attention_bias", "class_token", "no_embed_class", "pre_norm", "proj_bias", "qkv_bias",
            "tie_word_embeddings", "vision_use_head",
        ),
        SWITCH,
    ),
    **dict.fromkeys(
        (
            "add_cross_attention", "dynamic_img_pad", "fc_norm", "final_norm", "is_decoder", "is_encoder_decoder",
            "pool_include_prefix", "qk_norm", "scale_attn_by_inverse_layer_idx", "scale_attn_norm",
            "scale_attn_weights", "scale_mlp_norm", "tie_encoder_decoder", "use_bidirectional_attention",
        ),
        or_null(SWITCH),
    ),
    **dict.fromkeys(("activation_function", "architecture", "model_type"), TEXT),
    **dict.fromkeys(
        (
            "act_layer", "crop_mode", "hidden_act", "hidden_activation", "interpolation", "pos_embed", "rel_pos_type",
            "rope_type", "type",
        ),
        or_null(TEXT),
    ),
    "global_pool": KeyRule("a text, false or null", lambda value: value in (None, False) or TEXT.supports(value)),
    **dict.fromkeys(
        (
            "model_args", "pretrained_cfg", "pruned_heads", "rope_parameters", "rope_scaling", "text_config",
            "vision_config",
        ),
        or_null(OBJECT),
    ),
    **dict.fromkeys(("image_size", "img_size", "patch_size"), SIDES),
    "input_size": or_null(SIDES),
    "layer_types": or_null(LAYER_TYPES),
    **dict.fromkeys(("mean", "std"), or_null(THREE_NUMBERS)),
}  # fmt: skip
"""Rules of the keys of config.json that an import reads, in all sections. A later step checks whether a value fits the
model."""


def without_null(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not null."""
    return {key: value for key, value in settings.items() if value is not None}


def account_keys(
    file: str,
    settings: Mapping[str, Any],
    rules: Mapping[str, KeyRule],
    reasons: Mapping[str, str],
    defaults: Mapping[str, Any],
) -> tuple[FileReport, list[str]]:
    """Check each key of a JSON file, and return a report and one sentence for each key that is refused.

    Args:
        file: name of the file, for the sentences.
        settings: keys that the file sets. The caller leaves out a null that means "not set".
        rules: dict from keys to rules. A key with a reason in `reasons` needs no rule.
        reasons: dict from shell patterns of keys to the reason why the keys have no effect.
        defaults: values that transformers uses for keys that are not set. The default values must also obey the rules.
    """
    used, without_effect, problems = [], dict[str, tuple[str, ...]](), []
    for key, value in {**defaults, **settings}.items():
        reason = reason_without_effect(key, reasons)
        rule = rules.get(key)
        if reason is not None:
            if key in settings:
                without_effect[reason] = (*without_effect.get(reason, ()), key)
        elif rule is None:
            if key in settings:
                problems.append(f"{key} in {file} is {value!r}, and Lakesight does not know what this key means")
        elif not rule.supports(value):
            given = f"{key} in {file} is" if key in settings else f"{key} is missing in {file}, so transformers uses"
            problems.append(f"{given} {value!r}, and this import needs {rule.needs}")
        elif key in settings:
            used.append(key)
    return FileReport(file=file, used=tuple(used), without_effect=without_effect), problems
