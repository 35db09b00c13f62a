"""Selection of the rows that a rank reads at a step.

The selection is a pure function of the step and of the run's settings, so a run can resume at a step without any stored
state of the row order.

At position k of epoch e, row `permute(k)` is read. The permutation depends on (seed, e). The row of a position is
computed in O(1) time and memory. No list of rows is shuffled, stored or replayed. All ranks compute their parts of the
same infinite sequence of rows. The sequence does not depend on restarts or on the number of ranks.

The permutation of n rows is computed with a Feistel network, which permutes the numbers below a power of four. A result
outside [0, n) is mapped again until a result is inside [0, n). This method is called cycle walking (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002).

In a mix of several sources, the positions of an epoch are permuted by the same method. Each permuted position is a draw
from one source (a part of the mix). The draws from a source are numbered consecutively over all epochs. A second
Feistel network maps the number of a draw to a row of the source.
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
"""Smallest number of bits in a half of the Feistel network.

With fewer bits, the network could produce only a few of all permutations.
"""

_WORD = 2**64 - 1


class RowPicks(NamedTuple):
    """Rows that a rank reads at a step, and the epoch of each row. Each array has the shape [batch of the rank]."""

    rows: Int64s
    epochs: Int64s


def pick_rows(step: int, *, rank: int, world_size: int, batch_size: int, num_rows: int, seed: int) -> RowPicks:
    """Pick the rank's contiguous part of the global batch.

    The global batch of a step has the positions from step * batch_size up to, but not including,
    (step + 1) * batch_size in the infinite sequence of rows. A batch continues across the end of an epoch, so every
    batch is full, even if the batch is larger than the data. The global batches do not depend on the number of ranks.

    Args:
        step: number of the step, counted from 0.
        rank: number of this rank, 0 <= rank < world_size.
        world_size: number of ranks, a divisor of batch_size.
        batch_size: number of rows per step over all ranks together.
        num_rows: number of positions in an epoch, at least 1. A position stands for a row in the training shards, for a
            draw in an epoch of a mix, or for a window in an epoch of a token file.
        seed: seed of the run.
    """
    assert batch_size % world_size == 0, "prepare() and run_rank() refuse a batch size that cannot be divided equally"
    share = batch_size // world_size
    first = step * batch_size + rank * share
    epochs, positions = np.divmod(np.arange(first, first + share, dtype=np.int64), num_rows)
    return RowPicks(permute(positions, epochs, num_rows=num_rows, seed=seed), epochs)


def pick_mix_rows(picks: RowPicks, rows: Sequence[int], draws: Sequence[int], *, seed: int) -> RowPicks:
    """Map the draws of a mix to rows of its sources. The rows of all sources are numbered consecutively.

    Each pass over a source draws every row of the source once, in a new order.

    Args:
        picks: result of `pick_rows` with num_rows = sum(draws).
        rows: number of rows in each source, at least 1.
        draws: number of draws from each source per epoch of the mix, at least 1.
        seed: seed of the run.

    Returns:
        The row of each draw, and the row's epoch. The epoch is the number of complete passes over the row's source
        before the draw.
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
    """Map each position of each epoch to a row. For every seed and epoch, the map is a bijection of [0, num_rows).

    Args:
        positions: positions in the epoch, 0 <= position < num_rows.
        epochs: epoch of each position, in the same shape as `positions`.
        num_rows: number of rows that are permuted, at least 1.
        seed: seed of the permutations, any integer.
    """
    half = max(MIN_HALF_BITS, -(-(num_rows - 1).bit_length() // 2))
    if half == MIN_HALF_BITS:
        return _permute_few(positions, epochs, num_rows=num_rows, seed=seed)
    keys = _epoch_keys(epochs, seed)
    rows = _feistel(positions.astype(np.uint64), keys, half)
    while (outside := rows >= num_rows).any():
        rows[outside] = _feistel(rows[outside], keys[outside], half)
    return rows.astype(np.int64)


def _permute_few(positions: Int64s, epochs: Int64s, *, num_rows: int, seed: int) -> Int64s:
    """Compute `permute` for at most 4**MIN_HALF_BITS rows, from a table of all results of an epoch's Feistel network.

    With three rows, for example, a position needs 85 passes through the Feistel network on average. A lookup in the
    table is much faster than a pass through the Feistel network.
    """
    found, epoch_number = np.unique(epochs, return_inverse=True)
    values = np.arange(4**MIN_HALF_BITS, dtype=np.uint64)
    keys = np.repeat(_epoch_keys(found, seed)[:, None], len(values), axis=1)
    table = _feistel(np.broadcast_to(values, keys.shape), keys, MIN_HALF_BITS).astype(np.int64)
    rows = table[epoch_number, positions]
    while (outside := rows >= num_rows).any():
        rows[outside] = table[epoch_number[outside], rows[outside]]
    return rows


def _epoch_keys(epochs: Int64s, seed: int) -> UInt64s:
    return hash64s(np.full(epochs.shape, seed & _WORD, np.uint64), epochs.astype(np.uint64))


def _feistel(values: UInt64s, keys: UInt64s, half: int) -> UInt64s:
    """Apply a keyed bijection of [0, 4**half). Each round of the network is invertible, whatever its hash function."""
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (hash64s(keys, right, np.full_like(right, number)) & mask)
    return (left << shift) | right


def random_bits(picks: RowPicks, *, seed: int) -> UInt64s:
    """Compute 64 random bits for each row in its epoch.

    Args:
        picks: indices of rows, and the epoch of each row.
        seed: seed of the run.
    """
    epochs, rows = picks.epochs.astype(np.uint64), picks.rows.astype(np.uint64)
    return hash64s(np.full_like(epochs, seed & _WORD), epochs, rows)


def random_fractions(picks: RowPicks, count: int, *, seed: int) -> Float64s:
    """Compute random numbers in [0, 1) for each row in its epoch, in the shape [batch of the rank, count].

    A larger `count` appends numbers to each row, but does not change the first numbers.

    Args:
        picks: indices of rows, and the epoch of each row.
        count: number of random numbers per row.
        seed: seed of the run.
    """
    number = np.arange(count, dtype=np.uint64)
    columns = np.broadcast_arrays(
        np.uint64(seed & _WORD), picks.epochs[:, None].astype(np.uint64), picks.rows[:, None].astype(np.uint64), number
    )
    return (hash64s(*columns) >> np.uint64(11)).astype(np.float64) / 2**53


def hash64s(*columns: UInt64s) -> UInt64s:
    """For each position, hash the values of all arrays at this position to 64 bits, with a chain of SplitMix64."""
    state = np.zeros_like(columns[0])
    for column in columns:
        state = splitmix64(state ^ column)
    return state


def hash64(*values: int) -> int:
    """Hash integers of any sign to 64 bits. The result is the same on every machine and in every process."""
    state = 0
    for value in values:
        state = splitmix64(state ^ (value & _WORD))
    return state
