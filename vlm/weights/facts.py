"""What two configs say of one model, each in its own words: a fact reads both, and writes theirs from ours.

So an incoming config.json is checked against the model's config, and an outgoing one is written, from one list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.config import AttentionConfig, ModelConfig

Settings = Mapping[str, Any]

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
"""Names of activations in transformers, and here. Where several are one function, the first is written."""


class Untold:
    """What a config.json does not say, where the library assumes nothing either."""


UNTOLD = Untold()


@dataclass(frozen=True)
class Fact:
    """One thing both configs say.

    Attributes:
        path: where our config says it.
        keys: where theirs does; empty where the family's name says it.
        ours: our value, from the model's config.
        theirs: our value, from their settings with defaults filled in; UNTOLD: they do not say.
        write: their settings, from our value.
    """

    path: str
    keys: str
    ours: Callable[[ModelConfig], Any]
    theirs: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]] = lambda _: {}


def same(path: str, key: str, values: Mapping[str, str] | None = None) -> Fact:
    """Our `path` and their `key` hold one value; words are spelled as `values` says, theirs to ours."""
    spellings = values or {}
    spelled = {ours: theirs for theirs, ours in reversed(list(spellings.items()))}

    def theirs(settings: Settings) -> Any:
        value = settings.get(key, UNTOLD)
        return spellings.get(value, value) if isinstance(value, str) else value

    def write(value: Any) -> dict[str, Any]:
        return {key: spelled.get(value, value) if isinstance(value, str) else value}

    return Fact(path, key, at(path), theirs, write)


def always(path: str, value: Any) -> Fact:
    """Our `path` has this value in every model of the family."""
    return Fact(path, "", at(path), lambda _: value)


def only(key: str, value: Any) -> Fact:
    """Their `key` must have this value: any other is something that models here cannot do."""
    return Fact("what models here do", key, lambda _: value, lambda settings: settings.get(key, value))


def tell(key: str, ours: Callable[[ModelConfig], Any]) -> Fact:
    """Their `key` is written and never compared: their tensors say it, or it may differ."""
    return Fact("", key, ours, lambda _: UNTOLD, lambda value: {key: value})


def heads(path: str, width: str, count: str) -> tuple[Fact, ...]:
    """Attention whose heads share the width: how many there are, and what follows from it."""
    return (
        same(f"{path}.num_heads", count),
        Fact(f"{path}.num_kv_heads", count, at(f"{path}.num_kv_heads"), lambda settings: settings[count]),
        Fact(
            f"{path}.head_dim",
            f"{width} / {count}",
            at(f"{path}.head_dim"),
            lambda settings: settings[width] / settings[count],
        ),
    )


def classic(path: str) -> tuple[Fact, ...]:
    """The transformer at `path` is of the older make: layer norms, plain MLPs, learned positions, bare attention."""
    return (
        always(f"{path}.norm.kind", "layer"),
        always(f"{path}.position.kind", "learned"),
        always(f"{path}.mlp.kind", "plain"),
        always(f"{path}.mlp.bias", True),
        always(f"{path}.sandwich", False),
        always(f"{path}.attention.soft_cap", None),
        always(f"{path}.attention.windows", (None,)),
        usual_scale(path),
    )


def usual_scale(path: str) -> Fact:
    """Scores are divided by the root of the head's width."""
    return Fact(
        f"{path}.attention.scale * sqrt(head_dim)",
        "",
        lambda config: scale(at(f"{path}.attention")(config)) * at(f"{path}.attention.head_dim")(config) ** 0.5,
        lambda _: 1.0,
    )


def scale(attention: AttentionConfig) -> float:
    """What attention multiplies its scores with."""
    return attention.scale if attention.scale is not None else attention.head_dim**-0.5


def inside(section: str, facts: Iterable[Fact], defaults: Settings) -> tuple[Fact, ...]:
    """The facts of a part, whose settings stand in a `section` of the whole's."""
    return tuple(_inside(section, fact, defaults) for fact in facts)


def _inside(section: str, fact: Fact, defaults: Settings) -> Fact:
    return Fact(
        fact.path,
        fact.keys and f"{section}.{fact.keys}",
        fact.ours,
        lambda settings: fact.theirs({**defaults, **settings.get(section, {})}),
        lambda value: {section: fact.write(value)},
    )


def at(path: str) -> Callable[[ModelConfig], Any]:
    """Reads the value at a dotted path; None where this kind of part has no such value."""

    def read(config: ModelConfig) -> Any:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name, None)
        return value

    return read


# ------------------------------------------------------------------------------------------------ two configs compared


def disagreements(facts: Iterable[Fact], config: ModelConfig, settings: Settings) -> list[str]:
    """A sentence for each fact that the two configs tell differently."""
    sentences = []
    for fact in facts:
        ours, theirs = fact.ours(config), fact.theirs(settings)
        if theirs is not UNTOLD and not _equal(ours, theirs):
            said = f"{fact.keys} in the file makes it" if fact.keys else "weights of this family have"
            sentences.append(f"{fact.path}: {said} {theirs!r}, the model has {ours!r}")
    return sentences


def untold(facts: Iterable[Fact], settings: Settings) -> list[str]:
    """What the file does not say, so that nobody compared it."""
    return [fact.path for fact in facts if fact.path and fact.theirs(settings) is UNTOLD]


def written(facts: Iterable[Fact], config: ModelConfig) -> dict[str, Any]:
    """Their settings as our config has them, sections merged."""
    settings: dict[str, Any] = {}
    for fact in facts:
        merge(settings, fact.write(fact.ours(config)))
    return settings


def merge(into: dict[str, Any], new: Settings) -> None:
    """Add settings to settings, section by section."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def _equal(one: Any, other: Any) -> bool:
    """Equal values; numbers up to the rounding of decimal notation."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else bool(one == other)
