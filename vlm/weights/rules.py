"""Rules that map tensors between another library and our model. Each rule converts in both directions.

`theirs` are names in the other library's file, `ours` are names of our parameters. Names are templates: `{i}` stands
for the block number, `*` for weight and bias. A rule applies if the model has all of its parameters, so the config
decides how many blocks there are and whether a layer has a bias, never the file.
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
    """Layout of a position embedding table over a square of patches, which can be resampled to another resolution.

    Attributes:
        extra: rows before the patches (class token, registers).
        mode: interpolation, which is antialiased.
    """

    extra: int
    mode: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class Rule:
    """Conversion of tensors of the other library to our parameters.

    Attributes:
        theirs: names in the file.
        ours: names of our parameters.
        read: converts their tensors to ours.
        write: converts our tensors to theirs; the exact inverse of `read`.
        grid: layout of a position embedding table; None for any other tensor.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Transform
    write: Transform
    grid: PositionGrid | None = None


@dataclass(frozen=True)
class Drop:
    """Tensors in the file that the model does not need, by a shell pattern (`fnmatch`), with the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Tie:
    """Tensor `theirs` that repeats tensor `partner` of the file if the model has no separate parameter `ours`."""

    theirs: str
    partner: str
    ours: str


@dataclass(frozen=True)
class WeightTable:
    """Mapping of all tensors of a family.

    Attributes:
        rules: conversions.
        drops: tensors that import leaves out.
        ties: tensors that a file may store twice.
    """

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()
    ties: tuple[Tie, ...] = ()

    def with_prefix(self, prefix: str) -> WeightTable:
        """Return the same table for files whose tensor names begin with `prefix`."""
        return WeightTable(
            tuple(replace(rule, theirs=tuple(prefix + name for name in rule.theirs)) for rule in self.rules),
            tuple(replace(drop, pattern=prefix + drop.pattern) for drop in self.drops),
            tuple(replace(tie, theirs=prefix + tie.theirs, partner=prefix + tie.partner) for tie in self.ties),
        )

    def with_drops(self, *drops: Drop) -> WeightTable:
        """Return the same table with additional drops."""
        return replace(self, drops=(*self.drops, *drops))


# ------------------------------------------------------------------------------------------------ kinds of rules


def rename(theirs: str, ours: str) -> Rule:
    """Return a rule for the same tensor under another name."""
    return Rule((theirs,), (ours,), list, list)


def add_axes(theirs: str, ours: str, count: int) -> Rule:
    """Return a rule for a tensor to which our model adds `count` leading axes of length 1."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][(None,) * count]]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][(0,) * count]]

    return Rule((theirs,), (ours,), read, write)


def transpose(theirs: str, ours: str) -> Rule:
    """Return a rule for a weight that the file stores as (in, out). A bias is not changed."""

    def turn(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].t()]

    return Rule((theirs,), (ours,), turn, turn)


def concat(theirs: Sequence[str], ours: str, sizes: Sequence[int]) -> Rule:
    """Return a rule that concatenates several of their tensors, of `sizes` rows, to one of ours."""
    return Rule(tuple(theirs), (ours,), _concatenate, _splitter(sizes))


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Return a rule that splits one of their tensors into several of ours, of `sizes` rows."""
    return Rule((theirs,), tuple(ours), _splitter(sizes), _concatenate)


def patch_projection(theirs: str, ours: str, patch_size: int) -> Rule:
    """Return a rule for a patch embedding that the file stores as a linear layer and our model as a convolution.

    The linear layer's inputs are the numbers of a patch in the order (rows, columns, channels).
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.unflatten(tensors[0], 1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2)]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].permute(0, 2, 3, 1).flatten(1)]

    return Rule((theirs,), (ours,), read, write)


def position_table(rule: Rule, *, extra: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> Rule:
    """Return the rule of a position embedding table that can be resampled: `extra` rows, then a square of patches."""
    return replace(rule, grid=PositionGrid(extra, mode))


def _concatenate(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _splitter(sizes: Sequence[int]) -> Transform:
    def split_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.split(tensors[0], list(sizes)))

    return split_rows


# ------------------------------------------------------------------------------------------------ templates


def expand_rules(rules: Iterable[Rule], ours: Iterable[str]) -> Iterator[Rule]:
    """Yield the rules with full names in place of templates, if the model has all parameters of the rule.

    Args:
        rules: rules with templates.
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
    """Return the patches along one side for a position table of `rows` rows, or None if they do not form a square."""
    patches = rows - grid.extra
    root = math.isqrt(max(patches, 0))
    return root if root and root * root == patches else None


def resample_positions(table_1NW: Tensor, rows: int, grid: PositionGrid) -> Tensor:
    """Resample a position table (1, N, W) to (1, rows, W) by interpolating over the square of patches.

    The interpolation is that of timm's `resample_abs_pos_embed`: fp32 and antialiased. The extra rows are kept.
    """
    extra, patches = torch.split(table_1NW, [grid.extra, table_1NW.shape[1] - grid.extra], dim=1)
    before, after = grid_side(table_1NW.shape[1], grid), grid_side(rows, grid)
    assert before is not None
    assert after is not None
    square = torch.unflatten(patches.float(), 1, (before, before)).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(after, after), mode=grid.mode, antialias=True)
    return torch.cat((extra, square.flatten(2).transpose(1, 2).to(table_1NW.dtype)), dim=1)
