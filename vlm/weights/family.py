"""Description of a weight family: how to recognise the family's config.json, and how to convert the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.config import ModelConfig
from vlm.weights.accounting import (
    WITHOUT_EFFECT,
    TrackedSettings,
    WrongValueError,
    leaf_values,
    reason_without_effect,
    tracked,
)
from vlm.weights.config_fields import UNKNOWN, ConfigField, Settings, build_settings, find_mismatches, unchecked_paths
from vlm.weights.key_rules import CONFIG_RULES
from vlm.weights.rules import WeightTable
from vlm.weights.tensor_sizes import Shapes, TensorSize, find_contradictions

NOT_COMPARED = "is not compared, because the names and shapes of the tensors decide"
"""Reason for a key that an export writes and that an import does not compare."""
Part = Literal["model", "encoder", "decoder"]


@dataclass(frozen=True)
class KeyAccount:
    """Keys of a config.json as dotted paths, in three groups: compared keys, keys without effect, and unknown keys.

    Attributes:
        compared: keys whose values an import compares with the model's config or with the shapes of the tensors.
        without_effect: keys that have no effect on the imported part, as a dict from the reason to the keys.
        unknown: dict from each refused key to the key's value.
    """

    compared: list[str]
    without_effect: dict[str, list[str]]
    unknown: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Weights of one architecture in the format of another library.

    Attributes:
        name: name of the family in commands and reports.
        part: which part of our model the weights fill (`model`, `encoder` or `decoder`).
        select_settings: function that returns the section of a config.json that describes this family's weights, or
            None if the config.json belongs to a different family.
        fields: config fields, which map values between config.json and our config.
        table: function that returns the weight table for a model's config.
        fixed_settings: settings that an export writes for every model of the family, such as the name of the model
            class.
        defaults: values that the other library assumes for keys that are not in config.json.
        without_effect: dict from a shell pattern of config.json keys to the reason why the matching keys have no effect
            on the imported part. An import refuses a key that is not null, that no config field reads, and that matches
            neither a pattern of `without_effect` nor a pattern of `accounting.WITHOUT_EFFECT`.
        sizes: sizes in config.json that an import compares with the shapes of the tensors.
        prefix: prefix of all tensor names. The files of a network without an output head may omit the prefix.
        legacy_prefixes: pairs of two name prefixes. Tensor names in other versions of the files begin with the first
            prefix. In the weight table, the same names begin with the second prefix instead. Only the first pair that
            matches a tensor name is used.
        vocab_section: section of config.json with the vocabulary size; empty if the size is at the top level, and None
            if the family has no vocabulary.
        newline_after_empty_prompt: whether a line break follows the start token even if the prompt is empty.
        image_processor: class of transformers that preprocesses pictures, for a folder whose files do not name a class.
            None means that config.json contains the preprocessing, as in timm. If the text is empty, a folder with a
            description of the preprocessing is refused.
        unwritten: function that returns the settings of a model that an exported config.json cannot describe, as a dict
            from the reason to the settings.
        image_id_key: key of the image token's id in config.json; empty for a family without image token.
        exportable: whether a checkpoint can be exported to the format of this family.
    """

    name: str
    part: Part
    select_settings: Callable[[Settings], Settings | None]
    fields: tuple[ConfigField, ...]
    table: Callable[[ModelConfig], WeightTable]
    fixed_settings: Mapping[str, Any]
    defaults: Settings = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[TensorSize, ...] = ()
    prefix: str = ""
    legacy_prefixes: tuple[tuple[str, str], ...] = ()
    vocab_section: str | None = None
    newline_after_empty_prompt: bool = False
    image_processor: str | None = ""
    unwritten: Callable[[ModelConfig], dict[str, tuple[str, ...]]] = lambda _: {}
    image_id_key: str = ""
    exportable: bool = True

    def wrong_values(self, settings: Settings) -> list[str]:
        """Return one sentence for each value of a config.json that an import reads and that has the wrong type or is
        out of range.
        """
        seen = self._with_defaults(TrackedSettings(settings, set(), rules=CONFIG_RULES))
        problems = []
        for read in (*(each.theirs for each in self.fields), self._read_sizes):
            try:
                read(seen)
            except WrongValueError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))

    def _read_sizes(self, settings: Settings) -> None:
        """Read the sizes of pictures and texts, because imports read these sizes even if no config field reads them."""
        whole = self.part == "model"
        vision = (settings.get("vision_config") or {}) if whole else settings
        text = (settings.get("text_config") or {}) if whole else settings
        for key in ("image_size", "patch_size") if self.part != "decoder" else ():
            vision.get(key)
        for key in ("vocab_size", "max_position_embeddings") if self.vocab_section is not None else ():
            text.get(key)

    def contradictions(self, settings: Settings, shapes: Shapes) -> list[str]:
        """Return one sentence for each size in a config.json that differs from the shapes of the tensors.

        Args:
            settings: content of config.json.
            shapes: dict from canonical tensor names to shapes.
        """
        return find_contradictions(self.sizes, self._with_defaults(settings), shapes)

    def mismatches(self, config: ModelConfig, settings: Settings, *, pictures: bool = True) -> list[str]:
        """Return one sentence for each value that differs between a config.json and the model's config.

        Also return one sentence for each key of config.json whose meaning Lakesight does not know, and for each
        compared key that has another value in a copied section.

        Args:
            config: config of the model.
            settings: content of config.json.
            pictures: whether to compare the values of the section `image` of the model's config.
        """
        fields = [each for each in self.fields if pictures or not each.path.startswith("image.")]
        differences = find_mismatches(fields, config, self._with_defaults(settings))
        account = self.account(settings)
        unknown = [
            f"{path} in config.json is {value!r}, and Lakesight does not know what this key means"
            for path, value in account.unknown.items()
        ]
        return differences + unknown + self._differing_copies(settings, account.compared)

    def account(self, settings: Settings) -> KeyAccount:
        """Divide the keys of a config.json into compared keys, keys without effect, and unknown keys."""
        read, known = set[str](), set[str]()
        for each in self.fields:
            found: set[str] = set()
            value = each.theirs(self._with_defaults(TrackedSettings(settings, found)))
            (known if value is UNKNOWN else read).update(found)
        account = KeyAccount(compared=[], without_effect={}, unknown={})
        copy, original, _ = self._copied_section(settings) or ("", "", {})
        for path, value in leaf_values(settings):
            reason = reason_without_effect(path, {**self.without_effect, **WITHOUT_EFFECT})
            is_copy = copy and path.startswith(f"{copy}.") and f"{original}.{path.partition('.')[2]}" in read
            if path in read or is_copy:
                account.compared.append(path)
            elif reason is not None or path in known:
                account.without_effect.setdefault(reason or NOT_COMPARED, []).append(path)
            elif value is not None:  # null means that the key is not set
                account.unknown[path] = value
        return account

    def unchecked(self, settings: Settings) -> list[str]:
        """Return the paths of the values in the model's config that a config.json does not determine."""
        return unchecked_paths(self.fields, self._with_defaults(settings))

    def known_values(self, settings: Settings) -> dict[str, Any]:
        """Return a dict from paths of our config to values of a config.json. If the config.json does not determine a
        value, the value is UNKNOWN.
        """
        seen = self._with_defaults(settings)
        return {each.path: each.theirs(seen) for each in self.fields}

    def _copied_section(self, settings: Settings) -> tuple[str, str, Settings] | None:
        """Return the name of a copied section, the name of the original section, and the copy. Return None if
        config.json has no copied section.

        Files that transformers 4 wrote for CLIP have the section `vision_config_dict` beside `vision_config`.
        """
        selected = self.select_settings(settings)
        for key, value in settings.items():
            original = key.removesuffix("_dict")
            if original != key and isinstance(value, Mapping) and selected == (settings.get(original) or {}):
                return key, original, value
        return None

    def _differing_copies(self, settings: Settings, compared: Iterable[str]) -> list[str]:
        """Return one sentence for each compared key that has another value in a copied section.

        Transformers reads the copy. For keys that the copy lacks, transformers uses its own defaults.
        """
        if (found := self._copied_section(settings)) is None:
            return []
        copy, original, values = found
        read, other = self._with_defaults(settings), {**self.defaults, **values}
        keys = {path.partition(".")[2]: None for path in compared if path.startswith((f"{copy}.", f"{original}."))}
        return [
            f"{original}.{key} in config.json is {own!r}, and {copy} makes transformers use {copied!r}"
            for key in keys
            if (own := read.get(key)) != (copied := other.get(key))
        ]

    def _with_defaults(self, settings: Settings) -> Settings:
        return tracked(self.select_settings(settings) or {}, self.defaults)

    def matches_architecture(self, config: ModelConfig) -> bool:
        """Return True if the model config has the architecture of this family, regardless of sizes such as width and
        depth.
        """
        return not find_mismatches([each for each in self.fields if not each.keys], config, {})

    def to_settings(self, config: ModelConfig) -> dict[str, Any]:
        """Return the content of config.json from which the other library builds the exported part of the model."""
        return {**self.fixed_settings, **build_settings(self.fields, config)}

    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return a dict from canonical tensor names, which weight tables use, to the tensor names in the file.

        If two tensor names in a file have the same canonical form, the second name is not changed.
        """
        names = list(names)
        prefix = "" if any(name.startswith(self.prefix) for name in names) else self.prefix
        by_canonical: dict[str, str] = {}
        for name in names:
            canonical = prefix + self._with_current_prefix(name)
            by_canonical[name if canonical in by_canonical else canonical] = name
        return by_canonical

    def _with_current_prefix(self, name: str) -> str:
        for old, new in self.legacy_prefixes:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def transformers_family(
    name: str,
    part: Part,
    *,
    architecture: str,
    sections: Mapping[str, str],
    fields: tuple[ConfigField, ...],
    table: Callable[[ModelConfig], WeightTable],
    **options: Any,
) -> Family:
    """Return a family of the transformers library, which is recognised by `model_type` in config.json.

    Args:
        name: name of the family in commands and reports.
        part: which part of our model the weights fill (`model`, `encoder` or `decoder`).
        architecture: name of the class in the library transformers that loads an exported folder.
        sections: dict from each `model_type` to the family's section of config.json; an empty section name means the
            whole file. An export writes the first `model_type`.
        fields: config fields, which map values between config.json and our config.
        table: function that returns the weight table for a model's config.
        **options: other attributes of `Family`.
    """

    def select_settings(settings: Settings) -> Settings | None:
        section = sections.get(str(settings.get("model_type")))
        if section is None:
            return None
        return (settings.get(section) or {}) if section else settings

    fixed = {"architectures": [architecture], "model_type": next(iter(sections))}
    return Family(name, part, select_settings, fields, table, fixed, **options)
