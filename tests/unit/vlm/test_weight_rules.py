"""Tests of weight table rules: an export exactly inverts an import, and an import plan covers every tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.config import available, load_model
from vlm.weights.files import TensorHeader
from vlm.weights.plan import merge_block_names, plan_load
from vlm.weights.rules import (
    Drop,
    Rule,
    Tie,
    WeightTable,
    add_axes,
    concat,
    expand_rules,
    patch_projection,
    position_table,
    rename,
    resample_positions,
    split,
    transpose,
)
from vlm.weights.tables import families

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
COUNT = st.integers(1, 4)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_invertible(rule: Rule, theirs: list[Tensor]) -> list[Tensor]:
    ours = rule.read(theirs)
    back = rule.write(ours)
    assert all(torch.equal(one, other) for one, other in zip(theirs, back, strict=True))
    return ours


@given(sizes=SIZES, width=COUNT)
def test_concat_and_split_rules_are_invertible(sizes: list[int], width: int) -> None:
    parts, whole = [random(size, width) for size in sizes], random(sum(sizes), width)
    names = [f"part{index}" for index in range(len(sizes))]
    joined = assert_invertible(concat(names, "whole", sizes), parts)
    assert torch.equal(joined[0][: sizes[0]], parts[0])
    pieces = assert_invertible(split("whole", names, sizes), [whole])
    assert [len(piece) for piece in pieces] == sizes


@settings(deadline=None)  # the first convolution in a process takes about one second
@given(out=COUNT, patch=COUNT, channels=COUNT, axes=st.integers(0, 3))
def test_transpose_patch_projection_and_add_axes_rules_are_invertible(
    out: int, patch: int, channels: int, axes: int
) -> None:
    linear = random(out, patch * patch * channels)
    (convolution,) = assert_invertible(patch_projection("a", "b", patch), [linear])
    picture = random(1, channels, patch, patch)
    unrolled = picture.permute(0, 2, 3, 1).flatten()
    torch.testing.assert_close(torch.conv2d(picture, convolution).flatten(), linear @ unrolled)
    assert assert_invertible(transpose("a", "b"), [linear])[0].shape == linear.shape[::-1]
    assert assert_invertible(transpose("a", "b"), [linear[0]])[0].shape == linear.shape[1:]
    assert assert_invertible(add_axes("a", "b", axes), [linear])[0].ndim == 2 + axes
    assert_invertible(rename("a", "b"), [linear])


def test_weight_rules_apply_only_to_parameters_that_the_model_has() -> None:
    rules = [rename("h.{i}.fc.*", "blocks.{i}.up.*"), rename("norm.weight", "norm.weight"), rename("head", "head")]
    ours = ["blocks.0.up.weight", "blocks.0.up.bias", "blocks.1.up.weight", "norm.weight"]
    assert [rule.theirs[0] for rule in expand_rules(rules, ours)] == [
        "h.0.fc.weight",
        "h.0.fc.bias",
        "h.1.fc.weight",
        "norm.weight",
    ]


@given(before=st.integers(2, 6), after=st.integers(2, 6), extra=st.integers(0, 3))
def test_resampling_position_embeddings_keeps_the_extra_rows_and_leaves_constant_values_constant(
    before: int, after: int, extra: int
) -> None:
    rule = position_table(rename("a", "b"), extra=extra)
    assert rule.grid is not None
    table = torch.cat((random(1, extra, 2), torch.full((1, before**2, 2), 3.0)), dim=1)
    resampled = resample_positions(table, extra + after**2, rule.grid)
    assert torch.equal(resampled[:, :extra], table[:, :extra])
    torch.testing.assert_close(resampled[:, extra:], torch.full((1, after**2, 2), 3.0))


def test_an_import_plan_covers_every_tensor_of_the_weights_file() -> None:
    table = WeightTable(
        (rename("a", "x"), position_table(rename("p", "position"), extra=1), rename("gone", "z")),
        drops=(Drop("mask.*", "a constant"),),
        ties=(Tie("head", "a", "own_head"),),
    )
    ours = {"x": torch.zeros(2), "position": torch.zeros(1, 10, 2), "y": torch.zeros(1)}
    theirs = {
        "a": header(2),
        "p": header(1, 5, 2),
        "head": header(2),
        "mask.0": header(1),
        "b": header(1),
    }
    plan = plan_load(table, ours, theirs)
    assert (plan.tied, plan.dropped) == ({"head": "a"}, {"mask.0": "a constant"})
    assert [rule.ours for rule in plan.resampled] == [("position",)]
    assert plan.problems == [
        "unused in the file: b",
        "parameter without a tensor in the file: y",
    ]
    assert plan_load(table, ours, theirs | {"p": header(1, 6, 2)}).problems[-1].startswith("p has shape (1, 6, 2)")


def header(*shape: int) -> TensorHeader:
    return TensorHeader(shape, "F32", Path())


def test_error_messages_merge_tensor_names_that_differ_only_in_the_block_number() -> None:
    names = ["h.0.a", "h.1.a", "h.2.a", "h.0.b", "h.2.b", "h.4.c", "d"]
    assert merge_block_names(names) == ("d", "h.{0..2}.a", "h.{0,2}.b", "h.4.c")


PARTS = ("encoder", "decoder")
PUBLISHED = {
    "vit_gpt2": {"encoder": ["timm"], "decoder": ["gpt2"]},
    "clip_gpt2": {"encoder": ["clip"], "decoder": ["gpt2"]},
    "flamingo": {"encoder": ["clip"], "decoder": ["gpt2"]},
    "paligemma": {"model": ["paligemma"]},
    "paligemma2": {"model": ["paligemma2"]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_config_made_of_published_parts_fits_the_weight_families_of_these_parts(name: str) -> None:
    assert name in available("model")
    config = load_model(name)
    for part, names in PUBLISHED[name].items():
        fitting = [family for family in families() if family.part == part and family.matches_architecture(config)]
        assert [family.name for family in fitting if family.name in names] == names
        for family in fitting:
            if not family.exportable:
                continue  # Lakesight writes no config.json of this family
            assert family.mismatches(config, family.to_settings(config), pictures=False) == []
