"""Name maps as data. Each rule says which tensors of another library make which of ours, and how to go back.

Names are templates: `{i}` runs over blocks, `*` over weight and bias. A rule stands where the model has its parameters:
the config decides how many blocks there are and whether there is a bias, never the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Turn = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Grid:
    """Positions of a square of patches, which another resolution resamples.

    Attributes:
        extra: rows before the patches (class token, registers).
        mode: how to resample, antialiased.
    """

    extra: int
    mode: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs make tensors of ours.

    Attributes:
        theirs: names in the file.
        ours: names of parameters.
        read: from theirs to ours.
        write: its inverse, bit for bit.
        grid: the parameter is a table of positions.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Turn
    write: Turn
    grid: Grid | None = None


@dataclass(frozen=True)
class Drop:
    """Tensors in the file that the model has no place for, and why that is right. `pattern` as in a shell."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Tied:
    """Their `theirs` repeats their `partner` where the model has no parameter `ours` of its own."""

    theirs: str
    partner: str
    ours: str


@dataclass(frozen=True)
class Table:
    """A family's whole name map.

    Attributes:
        rules: what makes what.
        drops: what is left behind on purpose.
        ties: what a file may hold twice.
    """

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()
    ties: tuple[Tied, ...] = ()

    def under(self, prefix: str) -> Table:
        """The same table for files in which its tensors have `prefix`."""
        return Table(
            tuple(replace(rule, theirs=tuple(prefix + name for name in rule.theirs)) for rule in self.rules),
            tuple(replace(drop, pattern=prefix + drop.pattern) for drop in self.drops),
            tuple(replace(tie, theirs=prefix + tie.theirs, partner=prefix + tie.partner) for tie in self.ties),
        )

    def dropping(self, *drops: Drop) -> Table:
        """The same table with more to leave behind."""
        return replace(self, drops=(*self.drops, *drops))


# ------------------------------------------------------------------------------------------------ kinds of rules


def rename(theirs: str, ours: str) -> Rule:
    """The same tensor."""
    return Rule((theirs,), (ours,), list, list)


def add_axes(theirs: str, ours: str, count: int) -> Rule:
    """Ours has `count` more axes of one in front."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][(None,) * count]]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0][(0,) * count]]

    return Rule((theirs,), (ours,), read, write)


def transpose(theirs: str, ours: str) -> Rule:
    """Theirs is (in, out); a bias stays as it is."""

    def turn(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].t()]

    return Rule((theirs,), (ours,), turn, turn)


def concat(theirs: Sequence[str], ours: str, sizes: Sequence[int]) -> Rule:
    """Several of theirs, of `sizes` rows, make one of ours."""
    return Rule(tuple(theirs), (ours,), _join, _cut(sizes))


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """One of theirs makes several of ours, of `sizes` rows."""
    return Rule((theirs,), tuple(ours), _cut(sizes), _join)


def patches(theirs: str, ours: str, patch_size: int) -> Rule:
    """Theirs is a linear layer over the numbers of a patch, (rows, columns, channels); ours a convolution."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.unflatten(tensors[0], 1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2)]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].permute(0, 2, 3, 1).flatten(1)]

    return Rule((theirs,), (ours,), read, write)


def on_grid(rule: Rule, *, extra: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> Rule:
    """The rule of a table of positions: `extra` rows, then a square of patches."""
    return replace(rule, grid=Grid(extra, mode))


def _join(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _cut(sizes: Sequence[int]) -> Turn:
    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.split(tensors[0], list(sizes)))

    return cut


# ------------------------------------------------------------------------------------------------ names of templates


def expand(rules: Iterable[Rule], ours: Iterable[str]) -> Iterator[Rule]:
    """The rules that stand, name by name: those all of whose parameters the model has."""
    known = set(ours)
    blocks = 1 + max((int(word) for name in known for word in name.split(".") if word.isdigit()), default=-1)
    for rule in rules:
        for index in range(blocks if "{i}" in rule.ours[0] else 1):
            for kind in ("weight", "bias") if "*" in rule.ours[0] else ("",):
                named = _named(rule, str(index), kind)
                if known.issuperset(named.ours):
                    yield named


def _named(rule: Rule, index: str, kind: str) -> Rule:
    def fill(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.replace("{i}", index).replace("*", kind) for name in names)

    return replace(rule, theirs=fill(rule.theirs), ours=fill(rule.ours))


# ------------------------------------------------------------------------------------------------ another resolution


def side(rows: int, grid: Grid) -> int | None:
    """Patches along one side of a table of `rows` positions; None where they make no square."""
    patches = rows - grid.extra
    root = math.isqrt(max(patches, 0))
    return root if root and root * root == patches else None


def resample(table_1NW: Tensor, rows: int, grid: Grid) -> Tensor:
    """Positions (1, N, W) for a grid of another size, (1, rows, W): the picture between patches is interpolated.

    As timm's `resample_abs_pos_embed` does: in fp32, antialiased; the extra rows stay.
    """
    extra, patches = torch.split(table_1NW, [grid.extra, table_1NW.shape[1] - grid.extra], dim=1)
    before, after = side(table_1NW.shape[1], grid), side(rows, grid)
    assert before is not None
    assert after is not None
    square = torch.unflatten(patches.float(), 1, (before, before)).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(after, after), mode=grid.mode, antialias=True)
    return torch.cat((extra, square.flatten(2).transpose(1, 2).to(table_1NW.dtype)), dim=1)
