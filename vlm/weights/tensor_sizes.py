"""Comparison of the sizes in config.json with the tensors in the weight files. Only the headers of these files are
read.

A size such as `hidden_size` is in config.json and also in the shape of a tensor. If the size and the shape differ, an
import refuses the folder before a model is built. A wrong size, such as a number of layers in the millions, therefore
allocates no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm.weights.accounting import tracked
from vlm.weights.config_fields import UNKNOWN, Settings, sides_of

Shapes = Mapping[str, tuple[int, ...]]
"""Dict from canonical tensor names to shapes."""


@dataclass(frozen=True)
class TensorSize:
    """Value that both config.json and the tensors determine, such as a size.

    Attributes:
        key: key of the value in config.json, for error messages. For a computed value, `key` is a formula that contains
            all keys.
        theirs: function that reads the value from the settings of config.json, or returns UNKNOWN.
        tensor: canonical name of the tensor that determines the value. For a number of layers, the name contains `{i}`
            in place of the layer number.
        measure: function that returns the value that the tensor determines, and a clause that describes the tensor. The
            function returns None if the weight files do not determine the value.
    """

    key: str
    theirs: Callable[[Settings], Any]
    tensor: str
    measure: Callable[[Shapes, str], tuple[Any, str] | None]


def axis_size(key: str, tensor: str, axis: int, theirs: Callable[[Settings], Any] | None = None) -> TensorSize:
    """Return the `TensorSize` of a size that is the length of one axis of a tensor.

    Args:
        key: key of the size in config.json.
        tensor: canonical name of the tensor.
        axis: number of the axis.
        theirs: function that computes the size from the settings of config.json; by default the value of `key`.
    """

    def measure(shapes: Shapes, name: str) -> tuple[Any, str] | None:
        shape = shapes.get(name, ())
        if not -len(shape) <= axis < len(shape):
            return None
        return shape[axis], f"{name} in the weight files has shape {shape}"

    return TensorSize(key, theirs or _value_of(key), tensor, measure)


def num_layers(key: str, tensor: str) -> TensorSize:
    """Return the `TensorSize` of the number of layers. Each layer has one tensor whose name matches `tensor`."""

    def measure(shapes: Shapes, name: str) -> tuple[Any, str] | None:
        pattern = re.escape(name).replace(re.escape("{i}"), r"\d+")
        count = sum(1 for each in shapes if re.fullmatch(pattern, each))
        return (count, f"the weight files have {count} tensors {name}") if count else None

    return TensorSize(key, _value_of(key), tensor, measure)


def has_tensor(key: str, tensor: str) -> TensorSize:
    """Return the `TensorSize` of a setting which says whether the weight files have a tensor, such as a bias."""

    def measure(shapes: Shapes, name: str) -> tuple[Any, str] | None:
        return name in shapes, f"the weight files have {'a' if name in shapes else 'no'} tensor {name}"

    return TensorSize(key, _value_of(key), tensor, measure)


def patch_size(tensor: str) -> TensorSize:
    """Return the `TensorSize` of the patch size, which is the width of the kernel of the patch embedding."""
    return axis_size("patch_size", tensor, -1, lambda settings: _side(settings, "patch_size"))


def num_positions(tensor: str, *, extra: int) -> TensorSize:
    """Return the `TensorSize` of the number of positions of a picture: one for each patch, and `extra` more positions.

    Args:
        tensor: name of the position embedding table, whose second last axis has the positions.
        extra: number of positions that belong to no patch, such as the position of the class token.
    """

    def rows(settings: Settings) -> Any:
        side, patch = _side(settings, "image_size"), _side(settings, "patch_size")
        return UNKNOWN if UNKNOWN in (side, patch) else (side // patch) ** 2 + extra

    return axis_size(f"(image_size / patch_size) ** 2{f' + {extra}' if extra else ''}", tensor, -2, rows)


def product(one: str, other: str, tensor: str) -> TensorSize:
    """Return the `TensorSize` of a tensor whose number of rows is the product of two sizes with the keys `one` and
    `other`.
    """

    def multiplied(settings: Settings) -> Any:
        values = [settings.get(key, UNKNOWN) for key in (one, other)]
        return UNKNOWN if UNKNOWN in values else values[0] * values[1]

    return axis_size(f"{one} * {other}", tensor, 0, multiplied)


def _value_of(key: str) -> Callable[[Settings], Any]:
    return lambda settings: settings.get(key, UNKNOWN)


def _side(settings: Settings, key: str) -> Any:
    value = settings.get(key, UNKNOWN)
    return value if value is UNKNOWN else sides_of(value)[0]


def with_prefix(sizes: Iterable[TensorSize], prefix: str) -> tuple[TensorSize, ...]:
    """Copy sizes for tensors whose names begin with `prefix`, and return the copies."""
    return tuple(replace(size, tensor=prefix + size.tensor) for size in sizes)


def sizes_in_section(section: str, sizes: Iterable[TensorSize], defaults: Settings) -> tuple[TensorSize, ...]:
    """Copy sizes so that the copies read one section of config.json, and return the copies.

    Args:
        section: key of the section.
        sizes: sizes whose keys are relative to the section.
        defaults: values that an import assumes for keys that are missing in the section.
    """
    return tuple(_in_section(section, size, defaults) for size in sizes)


def _in_section(section: str, size: TensorSize, defaults: Settings) -> TensorSize:
    return replace(
        size,
        key=f"{size.key} of {section}",
        theirs=lambda settings: size.theirs(tracked(settings.get(section) or {}, defaults)),
    )


def find_contradictions(sizes: Iterable[TensorSize], settings: Settings, shapes: Shapes) -> list[str]:
    """Return one sentence for each value of config.json that differs from the tensors.

    A value is not compared if config.json or the weight files do not contain the value.
    """
    sentences = []
    for size in sizes:
        found, measured = size.theirs(settings), size.measure(shapes, size.tensor)
        if found is not UNKNOWN and measured is not None and found != measured[0]:
            needed, place = measured
            sentences.append(f"{size.key} in config.json is {found!r}, but {place}, so the value must be {needed!r}")
    return sentences
