"""Selection of the rows a rank reads at a step, as a pure function, so the data state of a run is one integer.

Position k of epoch e is row `permute(k)`, where the permutation is keyed by (seed, e) and computed per position in
O(1) time and memory. Nothing is shuffled, stored or replayed: every rank, at every step, after every restart and at
every world size computes its slice of the same infinite sequence.

The permutation is a Feistel network over the next power of four. A position that maps outside [0, n) is mapped again
until it lands inside, known as cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

A mix permutes the positions of its epochs in the same way. Each position is one draw of one part. Its row follows from
the number of the draw, because each part has permutations of its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.seeds import splitmix64

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Float64s = npt.NDArray[np.float64]

ROUNDS = 6
MIN_HALF_BITS = 4
"""Halves of one or two bits cannot produce most permutations of a few rows; cycle walking is cheap at this size."""

_WORD = 2**64 - 1


class RowPicks(NamedTuple):
    """Rows that a rank reads at a step, and the epoch of each. Both have the shape [batch of the rank]."""

    rows: Int64s
    epochs: Int64s


def pick_rows(step: int, *, rank: int, world_size: int, batch_size: int, num_rows: int, seed: int) -> RowPicks:
    """Pick the rank's contiguous slice of the global batch, positions [step * batch_size, (step + 1) * batch_size).

    A batch continues across the end of an epoch, so every batch is full, even if it is larger than the data.

    Args:
        step: counted from 0.
        rank: 0 <= rank < world_size.
        world_size: a divisor of batch_size; the sequence of global batches does not depend on it.
        batch_size: rows of all ranks together.
        num_rows: rows of the training shards, at least 1.
        seed: seed of the run.
    """
    assert batch_size % world_size == 0, "prepare() and run_rank() refuse this"
    share = batch_size // world_size
    first = step * batch_size + rank * share
    epochs, positions = np.divmod(np.arange(first, first + share, dtype=np.int64), num_rows)
    return RowPicks(permute(positions, epochs, num_rows=num_rows, seed=seed), epochs)


def pick_mix_rows(picks: RowPicks, rows: Sequence[int], draws: Sequence[int], *, seed: int) -> RowPicks:
    """Map draws of a mix to rows of its parts, which are numbered one part after another.

    All rows of a part are drawn once, in a new order each time, before any of them is drawn again.

    Args:
        picks: picks among sum(draws) positions, from `pick_rows`.
        rows: rows of each part, at least 1.
        draws: draws of each part per epoch, at least 1.
        seed: seed of the run.

    Returns:
        The rows; their epochs count the complete passes over the part before each draw.
    """
    found, rounds = np.empty_like(picks.rows), np.empty_like(picks.epochs)
    first_row = first_draw = 0
    for part, (size, share) in enumerate(zip(rows, draws, strict=True)):
        mine = (picks.rows >= first_draw) & (picks.rows < first_draw + share)
        numbers = picks.epochs[mine] * share + picks.rows[mine] - first_draw
        rounds[mine], positions = np.divmod(numbers, size)
        order = permute(positions, rounds[mine], num_rows=size, seed=hash64(seed, part))
        found[mine] = first_row + order
        first_row, first_draw = first_row + size, first_draw + share
    return RowPicks(found, rounds)


def permute(positions: Int64s, epochs: Int64s, *, num_rows: int, seed: int) -> Int64s:
    """Map each position of each epoch to a row: a bijection of [0, num_rows) for every seed and epoch.

    Args:
        positions: 0 <= position < num_rows.
        epochs: epoch of each position, same shape.
        num_rows: at least 1.
        seed: any integer.
    """
    half = max(MIN_HALF_BITS, -(-(num_rows - 1).bit_length() // 2))
    keys = hash64s(np.full(epochs.shape, seed & _WORD, np.uint64), epochs.astype(np.uint64))
    rows = _feistel(positions.astype(np.uint64), keys, half)
    while (outside := rows >= num_rows).any():
        rows[outside] = _feistel(rows[outside], keys[outside], half)
    return rows.astype(np.int64)


def _feistel(values: UInt64s, keys: UInt64s, half: int) -> UInt64s:
    """Apply a keyed bijection of [0, 4**half). Each round can be inverted, whatever the hash function."""
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (hash64s(keys, right, np.full_like(right, number)) & mask)
    return (left << shift) | right


def random_bits(picks: RowPicks, *, seed: int) -> UInt64s:
    """Compute 64 random bits for each row in its epoch.

    Args:
        picks: the rows and their epochs.
        seed: seed of the run.
    """
    epochs, rows = picks.epochs.astype(np.uint64), picks.rows.astype(np.uint64)
    return hash64s(np.full_like(epochs, seed & _WORD), epochs, rows)


def random_fractions(picks: RowPicks, count: int, *, seed: int) -> Float64s:
    """Compute random numbers for each row in its epoch, uniform in [0, 1): [batch of the rank, count].

    Args:
        picks: the rows and their epochs.
        count: numbers per row; a larger count leaves the first numbers unchanged.
        seed: seed of the run.
    """
    number = np.arange(count, dtype=np.uint64)
    columns = np.broadcast_arrays(
        np.uint64(seed & _WORD), picks.epochs[:, None].astype(np.uint64), picks.rows[:, None].astype(np.uint64), number
    )
    return (hash64s(*columns) >> np.uint64(11)).astype(np.float64) / 2**53


def hash64s(*columns: UInt64s) -> UInt64s:
    """Hash each row of several columns of equal shape to 64 bits, chaining SplitMix64."""
    state = np.zeros_like(columns[0])
    for column in columns:
        state = splitmix64(state ^ column)
    return state


def hash64(*values: int) -> int:
    """Hash integers of any sign to 64 bits, equally on every machine and in every process."""
    state = 0
    for value in values:
        state = splitmix64(state ^ (value & _WORD))
    return state
