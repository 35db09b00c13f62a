"""Check that an import knows every key of another library's config.json. An unknown key is an error.

An import reads config.json through `TrackedSettings`, which records the path of every value that a config field or a
family reads. If neither a config field nor the family reads a key, the key must be null, or must be in WITHOUT_EFFECT
or in the family's list of keys without effect. Any other key could change what the model computes, so an import refuses
the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol


class ValueRule(Protocol):
    """Values that are allowed for one key. `KeyRule` in `vlm.weights.key_rules` implements this protocol."""

    @property
    def needs(self) -> str:
        """The allowed values in words."""

    @property
    def supports(self) -> Callable[[Any], bool]:
        """Function that returns True for an allowed value."""


class WrongValueError(ValueError):
    """Error for a value in config.json that has the wrong type or is out of range. The message names the key."""


class TrackedSettings(Mapping[str, Any]):
    """Settings of a config.json. This class records the dotted path of each value that is read.

    Args:
        values: content of config.json, or of one section.
        read: set that collects the path of each value that is read.
        path: dotted path of the section, which ends with a dot; empty for the whole file.
        defaults: values for keys that are missing in `values`.
        rules: dict from keys to the values that are allowed for the keys, in all sections. By default, all values are
            allowed. Reading a value that is not allowed raises a WrongValueError.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        read: set[str],
        path: str = "",
        defaults: Mapping[str, Any] | None = None,
        rules: Mapping[str, ValueRule] | None = None,
    ) -> None:
        self._values, self._read, self._path = values, read, path
        self._defaults, self._rules = defaults or {}, rules or {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            return self._defaults[key]
        value, rule = self._values[key], self._rules.get(key)
        if rule is not None and not rule.supports(value):
            raise WrongValueError(f"{self._path}{key} in config.json is {value!r}, and this import needs {rule.needs}")
        if isinstance(value, Mapping):
            return TrackedSettings(value, self._read, f"{self._path}{key}.", rules=self._rules)
        self._read.add(self._path + key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._values, *self._defaults)))

    def __len__(self) -> int:
        return len({*self._values, *self._defaults})

    def __repr__(self) -> str:
        return repr(dict(self))

    def with_defaults(self, defaults: Mapping[str, Any]) -> TrackedSettings:
        """Return a copy of these settings that uses `defaults` for missing keys."""
        return TrackedSettings(self._values, self._read, self._path, {**defaults, **self._defaults}, self._rules)


def tracked(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy of the settings with defaults for missing keys. If the settings are TrackedSettings, the returned
    copy also records each value that is read.
    """
    if isinstance(settings, TrackedSettings):
        return settings.with_defaults(defaults)
    return {**defaults, **settings}


def leaf_values(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each key. For a section, yield the keys inside the section instead."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaf_values(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def reason_without_effect(path: str, reasons: Mapping[str, str]) -> str | None:
    """Return the reason why a key has no effect on the imported part, or None if no pattern matches the key.

    Args:
        path: dotted path of the key, such as `vision_config.hidden_size`.
        reasons: dict from shell patterns (`fnmatch`) to reasons. A pattern that begins with a slash matches a whole
            path. Any other pattern matches in every section, so `dropout` also matches `vision_config.dropout`.
    """
    return next((reason for pattern, reason in reasons.items() if _matches(path, pattern)), None)


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("/"):
        return fnmatchcase("/" + path, pattern)
    return fnmatchcase("." + path, "*." + pattern)


_TRAINING = "is used only while a model is trained; runs set their own value"
_GENERATION = "is a generation setting; the model config sets `generation`"
_SOFTWARE = "does not change the numbers that the model computes"
_DESCRIPTION = "describes the file"
_CLASSIFIER = "belongs to a classifier, which is not imported"

WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            "initializer_range", "initializer_factor", "attention_dropout", "dropout", "hidden_dropout_prob",
            "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop", "use_bfloat16",
            "gradient_checkpointing", "tf_legacy_loss",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        (
            "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
            "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "cache_config.*", "compile_config.*",
            "constraints", "continuous_batching_config.*", "decoder_start_token_id", "disable_compile",
            "diversity_penalty", "do_sample", "dola_layers", "early_stopping", "encoder_no_repeat_ngram_size",
            "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
            "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "is_assistant",
            "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens",
            "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
            "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_logits",
            "penalty_alpha", "prefill_chunk_size", "prefix", "prompt_lookup_num_tokens", "remove_invalid_values",
            "renormalize_logits", "repetition_penalty", "sep_token_id", "sequence_bias", "speculation_type",
            "stop_strings", "suppress_tokens", "target_lookbehind", "task_specific_params.*", "temperature",
            "token_healing", "top_h", "top_k", "top_p", "typical_p", "use_mtp", "watermarking_config.*",
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        (
            "_attn_implementation*", "cache_implementation", "chunk_size_feed_forward", "output_attentions",
            "output_hidden_states", "output_scores", "reorder_and_upcast_attn", "return_dict",
            "return_dict_in_generate", "torchscript", "use_cache",
        ),
        _SOFTWARE,
    ),
    **dict.fromkeys(
        (
            "_commit_hash", "_name_or_path", "architectures", "dtype", "finetuning_task", "model_type",
            "name_or_path", "tokenizer_class", "torch_dtype", "transformers_version",
        ),
        _DESCRIPTION,
    ),
    **dict.fromkeys(
        ("id2label.*", "label2id.*", "num_labels", "problem_type"), _CLASSIFIER
    ),
    **dict.fromkeys(("n_special", "output_past", "predict_special_tokens"), "is not read by transformers since 2020"),
    "vocab_size": "repeats the shape of a tensor, which is compared",
    "pad_token_id": "is the id of a padding token, which no attention reads",
}  # fmt: skip
"""Keys of the transformers library that have no effect on an import, and the reason for each key."""

NO_TEXT = "belongs to a text model, and an encoder reads no text"
ENCODER_WITHOUT_EFFECT = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "tie_word_embeddings"), NO_TEXT),
    **dict.fromkeys(("text_config.*", "text_config_dict.*"), NO_TEXT),
    **dict.fromkeys(("projection_dim", "logit_scale*"), "belongs to the joint space of text and pictures"),
    **dict.fromkeys(("pooler_output_size", "pooler_act", "encoder_stride"), "belongs to a layer that is not imported"),
}
"""Keys that have no effect on the import of an encoder, in addition to WITHOUT_EFFECT."""
DECODER_WITHOUT_EFFECT = dict.fromkeys(
    ("bos_token_id", "eos_token_id"), "is compared with the tokenizer of the model by `import-weights`"
)
"""Keys that `vlm.weights.special_tokens` compares after the tokenizer has been loaded."""
