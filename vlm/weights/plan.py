"""Plan of an import, made before any tensor is read: which parameter each tensor fills, and all mismatches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.errors import nearest
from vlm.weights.rules import Rule, WeightTable, expand_rules, grid_side

if TYPE_CHECKING:
    from vlm.weights.files import TensorHeader

FLOATS = {"F64", "F32", "F16", "BF16"}
Shape = tuple[int, ...]


@dataclass
class LoadPlan:
    """Import plan, which says what happens to each tensor of a weight file.

    Attributes:
        rules: conversion rules that apply to the model, with full tensor names instead of templates.
        tied: dict from the name of a tensor that is a copy to the name of the original tensor.
        dropped: dict from the name of a tensor to the reason why the model does not need the tensor.
        resampled: rules for position embedding tables whose resolution in the file is not the model's resolution.
        problems: one sentence per mismatch; empty if the file fits the model.
    """

    rules: list[Rule]
    tied: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    resampled: list[Rule] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def plan_load(table: WeightTable, ours: Mapping[str, Tensor], theirs: Mapping[str, TensorHeader]) -> LoadPlan:
    """Compare a weight table with a model and a file, and return the plan for each tensor of the file.

    Args:
        table: weight table of the family.
        ours: dict from name to parameter of the model; only the shapes are used, so meta tensors are enough.
        theirs: dict from the name of a tensor in the file to its header (shape and type).
    """
    plan = LoadPlan(list(expand_rules(table.rules, ours)))
    expected = [name for rule in plan.rules for name in rule.theirs]
    for tie in table.ties:
        if tie.theirs in theirs and tie.ours not in ours:
            plan.tied[tie.theirs] = tie.partner
    unused = [name for name in theirs if name not in plan.tied and name not in set(expected)]
    for name in unused:
        reason = next((drop.reason for drop in table.drops if fnmatchcase(name, drop.pattern)), None)
        if reason is not None:
            plan.dropped[name] = reason
    filled = {name for rule in plan.rules for name in rule.ours}
    unused = [name for name in unused if name not in plan.dropped]
    missing = [name for name in expected if name not in theirs]
    plan.problems += describe_names("missing in the file", missing, similar_to=unused or theirs)
    plan.problems += describe_names("unused in the file", unused, similar_to=missing or expected)
    plan.problems += describe_names("parameter without a tensor in the file", set(ours) - filled, similar_to=())
    for rule in plan.rules:
        if all(name in theirs for name in rule.theirs):
            _compare_headers(plan, rule, ours, theirs)
    return plan


def _compare_headers(
    plan: LoadPlan, rule: Rule, ours: Mapping[str, Tensor], theirs: Mapping[str, TensorHeader]
) -> None:
    """Compare the shapes and types of one rule's tensors with the model, and add each mismatch to the plan.

    The expected shapes are the shapes that an export of the model would write.
    """
    written = rule.write([torch.empty(ours[name].shape, device="meta") for name in rule.ours])
    for name, expected in zip(rule.theirs, (tuple(tensor.shape) for tensor in written), strict=True):
        header = theirs[name]
        if header.dtype not in FLOATS:
            plan.problems.append(f"{name} has type {header.dtype}, expected one of {', '.join(sorted(FLOATS))}")
        if header.shape == expected:
            continue
        if _has_other_resolution(rule, header.shape, expected):
            plan.resampled.append(rule)
        else:
            plan.problems.append(f"{name} has shape {header.shape}, the model needs {expected}")


def _has_other_resolution(rule: Rule, found: Shape, expected: Shape) -> bool:
    if rule.grid is None or len(found) != len(expected) or found[-1] != expected[-1]:
        return False
    return all(grid_side(shape[-2], rule.grid) is not None for shape in (found, expected))


# ------------------------------------------------------------------------------------------------ short lists of names


def describe_names(problem: str, names: Iterable[str], *, similar_to: Iterable[str]) -> list[str]:
    """Merge names that differ only in the block number, and return one sentence for each merged name.

    Args:
        problem: beginning of each sentence, which says what is wrong with the name.
        names: tensor names to describe.
        similar_to: tensor names that a sentence may suggest. If one of these names is similar to the merged name, the
            sentence suggests the most similar name.
    """
    candidates = group_by_block(similar_to)
    sentences = []
    for template, blocks in group_by_block(names).items():
        close = nearest(template, [name for name in candidates if name != template])
        hint = f" (nearest: {format_blocks(close[0], candidates[close[0]])})" if close else ""
        sentences.append(f"{problem}: {format_blocks(template, blocks)}{hint}")
    return sentences


def merge_block_names(names: Iterable[str]) -> tuple[str, ...]:
    """Merge names that differ only in the block number into one name, such as `h.{0..11}.attn.bias`."""
    return tuple(format_blocks(template, blocks) for template, blocks in group_by_block(names).items())


def group_by_block(names: Iterable[str]) -> dict[str, list[int]]:
    """Return a dict that maps each template to its block numbers.

    A template is a name with `{i}` in place of the block number.
    """
    groups: dict[str, list[int]] = {}
    for name in sorted(names):
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        template = name[: number.start()] + "{i}" + name[number.end() :] if number else name
        groups.setdefault(template, []).extend([int(number.group())] if number else [])
    return groups


def format_blocks(template: str, blocks: Sequence[int]) -> str:
    """Insert block numbers into a template, as in `h.{0..11}.attn.bias`, `h.{0,2}.attn.bias` or `h.3.attn.bias`."""
    if not blocks:
        return template
    low, high = min(blocks), max(blocks)
    contiguous = high - low + 1 == len(blocks)
    numbers = f"{low}..{high}" if contiguous else ",".join(map(str, sorted(blocks)))
    return template.replace("{i}", str(low) if low == high else "{" + numbers + "}", 1)
