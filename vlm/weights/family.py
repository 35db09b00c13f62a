"""A family: what its files are called, what its config says, which of its tensors are which of ours."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from vlm.config import ModelConfig
from vlm.weights import tables
from vlm.weights.facts import Fact, Settings, disagreements, untold, written
from vlm.weights.rules import Table

Part = Literal["model", "encoder", "decoder"]


@dataclass(frozen=True)
class Family:
    """Weights of one kind, as another library publishes them.

    Attributes:
        name: what a person calls it.
        part: what of a model they fill.
        settings: its part of a config.json; None where that is another family's.
        defaults: what the library assumes of keys that a config.json leaves out.
        facts: what both configs say.
        table: the name map, for a model's config.
        header: what an exported config.json begins with: the class that opens it.
        home: prefix of every name, which files of the bare network lack.
        older: prefixes of other versions, and the ones they became; the first that fits counts.
        text: section of config.json that has the vocabulary; None: the family has none.
        image_key: where config.json names the token that marks a picture's places; empty: nowhere.
    """

    name: str
    part: Part
    settings: Callable[[Settings], Settings | None]
    facts: tuple[Fact, ...]
    table: Callable[[ModelConfig], Table]
    header: Mapping[str, Any]
    defaults: Settings = field(default_factory=dict)
    home: str = ""
    older: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    image_key: str = ""

    def disagreements(self, config: ModelConfig, settings: Settings) -> list[str]:
        """What a config.json and the model's config tell differently, a sentence each."""
        return disagreements(self.facts, config, self._filled(settings))

    def untold(self, settings: Settings) -> list[str]:
        """What of the model's config a config.json does not say."""
        return untold(self.facts, self._filled(settings))

    def _filled(self, settings: Settings) -> Settings:
        return {**self.defaults, **(self.settings(settings) or {})}

    def fits(self, config: ModelConfig) -> bool:
        """Whether a model has the make of this family, whatever its sizes."""
        return not disagreements([fact for fact in self.facts if not fact.keys], config, {})

    def to_settings(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json that the other library needs to build the model's part."""
        return {**self.header, **written(self.facts, config)}

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """The file's name of each tensor, by the table's. One that would be the second of a name keeps its own."""
        names = list(names)
        home = "" if any(name.startswith(self.home) for name in names) else self.home
        spelled: dict[str, str] = {}
        for name in names:
            newest = home + self._newest(name)
            spelled[name if newest in spelled else newest] = name
        return spelled

    def _newest(self, name: str) -> str:
        for old, new in self.older:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def by_model_type(sections: Mapping[str, str]) -> Callable[[Settings], Settings | None]:
    """Families told by `model_type`; the value is the section their settings stand in, empty for the whole file."""

    def settings_of(settings: Settings) -> Settings | None:
        section = sections.get(str(settings.get("model_type")))
        if section is None:
            return None
        return settings.get(section, {}) if section else settings

    return settings_of


@cache
def families() -> tuple[Family, ...]:
    """Every family of vlm/weights/tables, by name."""
    names = [found.name for found in pkgutil.iter_modules(tables.__path__)]
    modules = [importlib.import_module(f"{tables.__name__}.{name}") for name in names]
    return tuple(sorted((family for module in modules for family in module.FAMILIES), key=lambda family: family.name))
