"""Rules for the keys of the JSON files next to config.json, such as preprocessor_config.json.

Every key of such a file has a rule or a reason why the key has no effect. A key without a rule and without a reason is
refused. A value that the rule of its key does not support is also refused.
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
        used: keys whose values agree with the model, or from which the model's config was derived.
        without_effect: dict from a reason to the keys that have no effect for this reason.
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
        return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value) and supports(value)

    return KeyRule(needs, check)


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
