"""Rules that convert another library's tensors to our parameters, and our parameters to the other library's tensors.

The field `theirs` of a rule contains tensor names in the other library's file, and `ours` contains names of our
parameters. All names are templates, in which `{i}` stands for the block number, and `*` stands for `weight` or `bias`.
A rule is used only if the model has all parameters in `ours`. The number of blocks and the presence of biases therefore
depend only on the model config, and not on the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Transform = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class PositionGrid:
    """Layout of a position embedding table that can be resampled to another picture resolution.

    The table has `extra` rows first, then one row per patch of a square grid.

    Attributes:
        extra: number of rows before the rows of the patches (class token, registers).
        mode: interpolation method, such as `bicubic`; the interpolation is always antialiased.
    """

    extra: int
    mode: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class Rule:
    """Conversion between some tensors of the other library and some parameters of our model.

    Attributes:
        theirs: names of the tensors in the other library's file.
        ours: names of our parameters.
        read: function that converts the other library's tensors to our parameters.
        write: function that converts our parameters to the other library's tensors, as the exact inverse of `read`.
        grid: layout of a position embedding table, or None for any other tensor.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Transform
    write: Transform
    grid: PositionGrid | None = None


@dataclass(frozen=True)
class Drop:
    """Shell pattern (`fnmatch`) for the names of tensors that the model does not need, and the reason to leave these
    tensors out.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class Tie:
    """Two tensors of a file that must be equal if the model ties their weights and therefore has no parameter `ours`.

    A file may contain `theirs`, `partner`, or both. If the file contains both `theirs` and `partner`, the two tensors
    must be equal.
    """

    theirs: str
    partner: str
    ours: str


@dataclass(frozen=True)
class WeightTable:
    """Mapping between all tensors of a family and our parameters.

    Attributes:
        rules: rules that convert tensors.
        drops: patterns of the tensors that an import leaves out.
        ties: pairs of tensors in a file that may be two copies of one tensor.
    """

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()
    ties: tuple[Tie, ...] = ()

    def with_prefix(self, prefix: str) -> WeightTable:
        """Return a copy of the weight table for files whose tensor names begin with `prefix`."""
        return WeightTable(
            tuple(replace(rule, theirs=tuple(prefix + name for name in rule.theirs)) for rule in self.rules),
            tuple(replace(drop, pattern=prefix + drop.pattern) for drop in self.drops),
            tuple(replace(tie, theirs=prefix + tie.theirs, partner=prefix + tie.partner) for tie in self.ties),
        )

    def with_drops(self, *drops: Drop) -> WeightTable:
        """Return a copy of the weight table that also leaves out the tensors that match the patterns in `drops`."""
        return replace(self, drops=(*self.drops, *drops))


# ------------------------------------------------------------------------------------------------ kinds of rules


def rename(theirs: str, ours: str) -> Rule:
    """Return a rule that gives a tensor another name and does not change the tensor."""
    return Rule((theirs,), (ours,), list, list)


def add_axes(theirs: str, ours: str, count: int) -> Rule:
    """Return a rule that adds `count` leading axes of length 1 to a tensor of the file."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][(None,) * count]]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][(0,) * count]]

    return Rule((theirs,), (ours,), read, write)


def transpose(theirs: str, ours: str) -> Rule:
    """Return a rule that transposes a weight stored with shape (inputs, outputs), and does not change a bias."""

    def turn(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].t()]

    return Rule((theirs,), (ours,), turn, turn)


def concat(theirs: Sequence[str], ours: str, sizes: Sequence[int]) -> Rule:
    """Return a rule that joins several tensors of the file into one parameter; `sizes` has the number of rows of each
    tensor.
    """
    return Rule(tuple(theirs), (ours,), _concatenate, _splitter(sizes))


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Return a rule that splits one tensor of the file into several parameters; `sizes` has the number of rows of each
    parameter.
    """
    return Rule((theirs,), tuple(ours), _splitter(sizes), _concatenate)


def patch_projection(theirs: str, ours: str, patch_size: int) -> Rule:
    """Return a rule for a patch embedding that is a linear layer in the file and a convolution in our model.

    The inputs of the linear layer are the values of one patch in the order (row, column, channel).
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.unflatten(tensors[0], 1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2)]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].permute(0, 2, 3, 1).flatten(1)]

    return Rule((theirs,), (ours,), read, write)


def position_table(rule: Rule, *, extra: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> Rule:
    """Copy the rule of a position embedding table so that an import may resample the table, and return the copy.

    The table has `extra` rows first, then one row per patch of a square grid.
    """
    return replace(rule, grid=PositionGrid(extra, mode))


def _concatenate(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _splitter(sizes: Sequence[int]) -> Transform:
    def split_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.split(tensors[0], list(sizes)))

    return split_rows


# ------------------------------------------------------------------------------------------------ templates


def expand_rules(rules: Iterable[Rule], ours: Iterable[str]) -> Iterator[Rule]:
    """Replace the templates of all rules with full names, and yield the rules whose parameters the model has.

    Args:
        rules: conversion rules, in which tensor names are templates.
        ours: names of the model's parameters.
    """
    known = set(ours)
    blocks = 1 + max((int(part) for name in known for part in name.split(".") if part.isdigit()), default=-1)
    for rule in rules:
        for index in range(blocks if "{i}" in rule.ours[0] else 1):
            for kind in ("weight", "bias") if "*" in rule.ours[0] else ("",):
                named = _fill_templates(rule, str(index), kind)
                if known.issuperset(named.ours):
                    yield named


def _fill_templates(rule: Rule, index: str, kind: str) -> Rule:
    def fill(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.replace("{i}", index).replace("*", kind) for name in names)

    return replace(rule, theirs=fill(rule.theirs), ours=fill(rule.ours))


# ------------------------------------------------------------------------------------------------ another resolution


def grid_side(rows: int, grid: PositionGrid) -> int | None:
    """Return the number of patches along one side of the square grid, or None if `rows` does not fit a square grid."""
    patches = rows - grid.extra
    root = math.isqrt(max(patches, 0))
    return root if root and root * root == patches else None


def resample_positions(table_1NW: Tensor, rows: int, grid: PositionGrid) -> Tensor:
    """Resample a position embedding table (1, N, W) to (1, rows, W) by interpolating over the square grid of patches.

    As in timm's `resample_abs_pos_embed`, the interpolation is antialiased and runs in fp32. The first `grid.extra`
    rows of the table are not changed.
    """
    extra, patches = torch.split(table_1NW, [grid.extra, table_1NW.shape[1] - grid.extra], dim=1)
    before, after = grid_side(table_1NW.shape[1], grid), grid_side(rows, grid)
    assert before is not None
    assert after is not None
    square = torch.unflatten(patches.float(), 1, (before, before)).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(after, after), mode=grid.mode, antialias=True)
    return torch.cat((extra, square.flatten(2).transpose(1, 2).to(table_1NW.dtype)), dim=1)
