"""Tests of the row order: each epoch is a permutation, and the sequence is the same for every world size."""

from __future__ import annotations

import hashlib
from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.worker.data.order import (
    RowPicks,
    hash64,
    permute,
    pick_mix_rows,
    pick_rows,
    random_bits,
    random_fractions,
)

seeds = st.integers(-(2**63), 2**64)


def epoch_of(num_rows: int, epoch: int, seed: int) -> list[int]:
    positions = np.arange(num_rows)
    return [int(row) for row in permute(positions, np.full(num_rows, epoch), num_rows=num_rows, seed=seed)]


@given(num_rows=st.integers(1, 3000), epoch=st.integers(0, 2**40), seed=seeds)
@settings(max_examples=50)
def test_every_epoch_visits_every_row_once(num_rows: int, epoch: int, seed: int) -> None:
    assert sorted(epoch_of(num_rows, epoch, seed)) == list(range(num_rows))


@given(num_rows=st.integers(2**40, 2**46), seed=seeds)
@settings(max_examples=20)
def test_computing_one_position_of_a_permutation_of_trillions_of_rows_takes_almost_no_memory(
    num_rows: int, seed: int
) -> None:
    positions = np.array([0, 1, num_rows // 2, num_rows - 1])
    rows = permute(positions, np.zeros(4, np.int64), num_rows=num_rows, seed=seed)
    assert len(set(rows.tolist())) == 4
    assert ((rows >= 0) & (rows < num_rows)).all()


def test_every_epoch_and_every_seed_has_its_own_row_order() -> None:
    orders = {tuple(epoch_of(100, epoch, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5])
def test_all_permutations_of_a_few_rows_are_equally_likely(num_rows: int) -> None:
    epochs = 4_800
    rows = permute(
        np.tile(np.arange(num_rows), epochs), np.repeat(np.arange(epochs), num_rows), num_rows=num_rows, seed=1
    )
    orders, counts = np.unique(rows.reshape(epochs, num_rows), axis=0, return_counts=True)
    assert len(orders) == len(list(permutations(range(num_rows))))
    expected, freedom = epochs / factorial(num_rows), factorial(num_rows) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_rows_that_are_neighbours_in_the_shards_are_not_neighbours_in_the_training_order() -> None:
    order = np.array(epoch_of(10_000, 0, 7))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


@given(
    step=st.integers(0, 10_000),
    share=st.integers(1, 8),
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    num_rows=st.integers(1, 200),
    seed=st.integers(0, 9),
)
@settings(max_examples=50)
def test_the_slices_of_a_batch_on_all_ranks_together_equal_the_batch_on_a_single_rank(
    step: int, share: int, world_size: int, num_rows: int, seed: int
) -> None:
    batch_size = 12 * share
    common = {"step": step, "batch_size": batch_size, "num_rows": num_rows, "seed": seed}
    single = pick_rows(rank=0, world_size=1, **common)
    slices = [pick_rows(rank=rank, world_size=world_size, **common) for rank in range(world_size)]
    assert np.concatenate([part.rows for part in slices]).tolist() == single.rows.tolist()
    assert np.concatenate([part.epochs for part in slices]).tolist() == single.epochs.tolist()


def test_512_ranks_share_a_billion_rows_and_a_restart_with_256_ranks_continues_at_the_next_step() -> None:
    """The cluster plan in docs/training.md assumes that a rank computes its rows without a shuffled list."""
    common = {"batch_size": 16_384, "num_rows": 10**9, "seed": 5}
    end_of_epoch = 10**9 // 16_384
    before = [
        pick_rows(end_of_epoch - 4 + n, rank=rank, world_size=512, **common) for n in range(4) for rank in range(512)
    ]
    after = [pick_rows(end_of_epoch + n, rank=rank, world_size=256, **common) for n in range(4) for rank in range(256)]
    rows, epochs = (np.concatenate(parts) for parts in zip(*before, *after, strict=True))
    positions = np.arange((end_of_epoch - 4) * 16_384, (end_of_epoch + 4) * 16_384)
    assert (epochs == positions // 10**9).all()
    assert (rows == permute(positions % 10**9, epochs, num_rows=10**9, seed=5)).all(), "one sequence"
    for epoch in range(2):
        mine = rows[epochs == epoch]
        assert len(np.unique(mine)) == len(mine)
        assert 0 <= mine.min() < 10**9 // 1000 < 999 * 10**9 // 1000 < mine.max() < 10**9, "from all data"


def test_a_batch_at_the_end_of_an_epoch_continues_with_rows_of_the_next_epoch() -> None:
    picks = [pick_rows(step, rank=0, world_size=1, batch_size=4, num_rows=6, seed=3) for step in range(3)]
    assert [part.epochs.tolist() for part in picks] == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]
    rows = np.concatenate([part.rows for part in picks])
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))


parts = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)


@given(parts=parts, seed=st.integers(0, 9))
@settings(max_examples=40)
def test_a_mix_draws_each_source_by_its_share_and_repeats_a_row_only_after_all_rows_of_its_source(
    parts: list[tuple[int, int]], seed: int
) -> None:
    sizes, draws = ([pair[n] for pair in parts] for n in range(2))
    epoch, epochs = sum(draws), 5
    picks = pick_rows(0, rank=0, world_size=1, batch_size=epoch * epochs, num_rows=epoch, seed=seed)
    found = pick_mix_rows(picks, sizes, draws, seed=seed)
    for first, size, share in zip(np.cumsum([0, *sizes]), sizes, draws, strict=False):
        mine = (found.rows >= first) & (found.rows < first + size)
        assert mine.reshape(epochs, epoch).sum(axis=1).tolist() == [share] * epochs
        rounds, rows = found.epochs[mine], found.rows[mine]
        assert len({*zip(rounds.tolist(), rows.tolist(), strict=True)}) == mine.sum()
        whole, rest = divmod(share * epochs, size)
        counts = [int((rounds == number).sum()) for number in range(whole + 1)]
        assert counts == [size] * whole + [rest]


def test_the_row_order_is_the_same_in_every_version_of_the_code() -> None:
    """Do not update these numbers: with a different row order, no existing run could resume."""
    assert epoch_of(8, 0, 0) == [6, 4, 5, 2, 1, 7, 0, 3]
    orders = hashlib.sha256()
    for rows in range(1, 300):
        positions, epochs = np.tile(np.arange(rows), 2), np.repeat([0, 2**40], rows)
        orders.update(permute(positions, epochs, num_rows=rows, seed=rows - 5).astype("<i8").tobytes())
    assert orders.hexdigest() == "7d2e333ad4c14d5bf23ff14744041c85f89137e28173afe7e26a25e61980630f"
    assert hash64(1, -2, 3) == 12056474070484764355
    picks = RowPicks(np.array([4, 5]), np.array([0, 1]))
    assert random_bits(picks, seed=-2).tolist() == [hash64(-2, 0, 4), hash64(-2, 1, 5)]
    assert (random_fractions(picks, 2, seed=-2) * 1e6).astype(int).tolist() == [[601109, 114547], [1050, 792469]]


def test_the_random_numbers_drawn_for_the_rows_are_distinct_and_uniformly_distributed() -> None:
    rows, epochs = (positions.ravel() for positions in np.meshgrid(np.arange(100), np.arange(20)))
    numbers = random_fractions(RowPicks(rows, epochs), 8, seed=1)
    assert len(np.unique(numbers)) == numbers.size
    assert (random_fractions(RowPicks(rows[7:9], epochs[7:9]), 3, seed=1) == numbers[7:9, :3]).all()
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - numbers.size / 20) ** 2 / (numbers.size / 20)).sum() < 19 + 4 * 38**0.5
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.1
