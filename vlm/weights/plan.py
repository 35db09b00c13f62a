"""A table met with a model and a file, before any tensor is read: what fills what, or everything that does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.errors import nearest
from vlm.weights.rules import Rule, Table, expand, side

if TYPE_CHECKING:
    from vlm.weights.files import Header

FLOATS = {"F64", "F32", "F16", "BF16"}
Shape = tuple[int, ...]


@dataclass
class Plan:
    """What to do with each tensor of a file.

    Attributes:
        rules: those that stand.
        tied: a name in the file, and the name it repeats.
        dropped: a name in the file, and why the model has no place for it.
        resampled: tables of positions for another resolution.
        problems: what does not fit, a sentence each; empty where all does.
    """

    rules: list[Rule]
    tied: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    resampled: list[Rule] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def make_plan(table: Table, ours: Mapping[str, Tensor], theirs: Mapping[str, Header]) -> Plan:
    """Meet a table with a model's parameters (on the meta device is enough) and a file's headers, by name."""
    plan = Plan(list(expand(table.rules, ours)))
    wanted = [name for rule in plan.rules for name in rule.theirs]
    for tie in table.ties:
        if tie.theirs in theirs and tie.ours not in ours:
            plan.tied[tie.theirs] = tie.partner
    left = [name for name in theirs if name not in plan.tied and name not in set(wanted)]
    for name in left:
        reason = next((drop.reason for drop in table.drops if fnmatchcase(name, drop.pattern)), None)
        if reason is not None:
            plan.dropped[name] = reason
    filled = {name for rule in plan.rules for name in rule.ours}
    left = [name for name in left if name not in plan.dropped]
    missing = [name for name in wanted if name not in theirs]
    plan.problems += told("missing in the file", missing, near=left or theirs)
    plan.problems += told("left over in the file", left, near=missing or wanted)
    plan.problems += told("a parameter of the model that the file has no tensor for", set(ours) - filled, near=())
    for rule in plan.rules:
        if all(name in theirs for name in rule.theirs):
            _compare(plan, rule, ours, theirs)
    return plan


def _compare(plan: Plan, rule: Rule, ours: Mapping[str, Tensor], theirs: Mapping[str, Header]) -> None:
    """Shapes and types of one rule's tensors: what the model would write is what the file has to hold."""
    written = rule.write([torch.empty(ours[name].shape, device="meta") for name in rule.ours])
    for name, wants in zip(rule.theirs, (tuple(tensor.shape) for tensor in written), strict=True):
        has = theirs[name]
        if has.dtype not in FLOATS:
            plan.problems.append(f"{name} is of type {has.dtype}: weights are one of {', '.join(sorted(FLOATS))}")
        if has.shape == wants:
            continue
        if _another_grid(rule, has.shape, wants):
            plan.resampled.append(rule)
        else:
            plan.problems.append(f"{name} has shape {has.shape}, the model wants {wants}")


def _another_grid(rule: Rule, has: Shape, wants: Shape) -> bool:
    if rule.grid is None or len(has) != len(wants) or has[-1] != wants[-1]:
        return False
    return all(side(shape[-2], rule.grid) is not None for shape in (has, wants))


# ------------------------------------------------------------------------------------------------ saying it shortly


def told(what: str, names: Iterable[str], *, near: Iterable[str]) -> list[str]:
    """One sentence a name, blocks together, each with the nearest name there is."""
    candidates = grouped(near)
    sentences = []
    for template, blocks in grouped(names).items():
        close = nearest(template, [name for name in candidates if name != template])
        hint = f" (nearest: {spelled(close[0], candidates[close[0]])})" if close else ""
        sentences.append(f"{what}: {spelled(template, blocks)}{hint}")
    return sentences


def together(names: Iterable[str]) -> tuple[str, ...]:
    """Names, those of several blocks as one."""
    return tuple(spelled(template, blocks) for template, blocks in grouped(names).items())


def grouped(names: Iterable[str]) -> dict[str, list[int]]:
    """Names with `{i}` for the number of a block, and the numbers."""
    groups: dict[str, list[int]] = {}
    for name in sorted(names):
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        template = name[: number.start()] + "{i}" + name[number.end() :] if number else name
        groups.setdefault(template, []).extend([int(number.group())] if number else [])
    return groups


def spelled(template: str, blocks: Sequence[int]) -> str:
    """A template with its numbers: `h.{0..11}.attn.bias`, `h.3.attn.bias`."""
    if not blocks:
        return template
    low, high = min(blocks), max(blocks)
    whole = high - low + 1 == len(blocks)
    numbers = f"{low}..{high}" if whole else ",".join(map(str, sorted(blocks)))
    return template.replace("{i}", str(low) if low == high else "{" + numbers + "}", 1)
