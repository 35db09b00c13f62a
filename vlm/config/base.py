"""Base class of all configs, and functions that describe invalid configs and differences between configs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm.config.problems import describe, problem_text

Probability = Annotated[float, Field(ge=0, lt=1)]


class _AddedLater:
    pass


ADDED_LATER = _AddedLater()
"""Mark for a config field that was added after hashes of the config had been stored. Hashes of stored data leave out
the field as long as the field has its default value.

A developer who adds a field to an existing config must put this mark into the type of the field, for example
`Annotated[int | None, ADDED_LATER]`.
"""


class Config(BaseModel):
    """Base class of all configs. Config objects cannot be changed, and an unknown key is an error.

    A number may also be given as a text, because YAML reads 1e-3 as a text. True, False and bytes are not numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, values: Any) -> Any:
        """Refuse True, False and bytes for numbers, because pydantic would silently convert True and b"1" to 1."""
        found = [
            f"{name} must be a number, not {value!r}"
            for name, value in (values.items() if isinstance(values, Mapping) else ())
            if _has_no_number(value) and name in cls.model_fields and _is_number(cls.model_fields[name].annotation)
        ]
        if found:
            raise ValueError("; ".join(found))
        return values

    def hashed_settings(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the settings to hash, without the fields in `exclude`.

        Fields with the mark ADDED_LATER, at any depth, are left out as long as they have their default value. A setting
        that a new version of Lakesight adds therefore changes no hash until somebody uses the setting.
        """
        return self.model_dump(exclude=_unused_settings(self) | dict.fromkeys(exclude, True))


def _has_no_number(value: object) -> bool:
    return isinstance(value, bool | bytes) or (isinstance(value, list | tuple) and any(map(_has_no_number, value)))


def _is_number(annotation: Any) -> bool:
    """Return True if a field of this type can hold a number or a list of numbers, but cannot hold True or False."""
    types = {*_leaf_types(annotation)}
    return bool(types & {int, float}) and bool not in types


def _leaf_types(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _leaf_types(get_args(annotation)[0])
    elif origin in (Union, UnionType, tuple, list):
        for part in get_args(annotation):
            yield from _leaf_types(part)
    else:
        yield annotation


def _unused_settings(value: object) -> dict[Any, Any]:
    """Return the fields to leave out of a hash, in the nested form of pydantic's argument `exclude`."""
    parts: Mapping[Any, object] = {}
    if isinstance(value, Config | Mapping):
        parts = dict(value)
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    unused: dict[Any, Any] = {key: nested for key, part in parts.items() if (nested := _unused_settings(part))}
    fields = type(value).model_fields if isinstance(value, Config) else {}
    for name, field in fields.items():
        if ADDED_LATER in field.metadata and parts[name] == field.get_default(call_default_factory=True):
            unused[name] = True
    return unused


def read_error_message(error: OSError | ValueError, root: type[BaseModel] | None = None) -> str:
    """Return one line that says why a config is invalid. At most three problems are listed, with their paths.

    Args:
        error: error that was raised while the config was read.
        root: class of the config. If `root` is given, the line also shows the invalid values, and suggests similar
            valid keys for unknown keys.
    """
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    if root is not None:
        first = [text for text, _ in describe(error, root)][:3]
    else:
        problems = [(".".join(map(str, problem["loc"])), problem_text(problem)) for problem in error.errors()[:3]]
        first = [f"{path}: {message}" if path else message for path, message in problems]
    more = error.error_count() - len(first)
    return "; ".join(first) + (f"; and {more} more" if more else "")


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield one sentence for each value that differs, such as `a.b is 1 in the saved config, 2 in the run`.

    Args:
        saved: values of a config that was read from disk.
        current: values of the run's config.
        path: prefix of the keys in the sentences; empty except in recursive calls.
    """
    for key in dict.fromkeys((*saved, *current)):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from config_differences(before, now, f"{path}{key}.")
        elif before != now:
            yield f"{path}{key} is {before!r} in the saved config, {now!r} in the run"
