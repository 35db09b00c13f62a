"""Which rows a rank sees at a step: a pure function, so the whole data state of a run is one integer.

Position k of epoch e is row `permute(k)` under a permutation keyed by (seed, e) that is computed per position, in O(1)
memory and time. So nothing is shuffled, stored or replayed: any rank, at any step, after any restart, at any world size
asks for its slice of the same endless sequence.

The permutation is a Feistel network over the next power of four, and positions that land outside [0, n) walk on along
their cycle until they come back inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

A mix has the same order over the positions of its epochs. Each position belongs to a part and is one draw of it: which
row it is follows from the draw's number, because a part's rows are gone through by permutations of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Float64s = npt.NDArray[np.float64]

ROUNDS = 6
MIN_HALF_BITS = 4
"""Halves of one or two bits leave most permutations of a handful of rows unreachable; walking is cheap there."""

_WORD = 2**64 - 1


class Draw(NamedTuple):
    """What a rank sees at a step: rows of the shards, and the epoch each is drawn in. Both [batch of the rank]."""

    rows: Int64s
    epochs: Int64s


def draw(step: int, *, rank: int, world_size: int, batch_size: int, num_rows: int, seed: int) -> Draw:
    """The rank's contiguous slice of the global batch `step`, positions [step * batch_size, (step + 1) * batch_size).

    A batch goes on across the end of an epoch, so every batch is full, also when it is larger than the data.

    Args:
        step: counted from 0.
        rank: 0 <= rank < world_size.
        world_size: a divisor of batch_size; the sequence of global batches does not depend on it.
        batch_size: of all ranks together.
        num_rows: rows of the training shards, at least 1.
        seed: of the run.
    """
    assert batch_size % world_size == 0, "prepare() and run_rank() refuse this"
    share = batch_size // world_size
    first = step * batch_size + rank * share
    epochs, places = np.divmod(np.arange(first, first + share, dtype=np.int64), num_rows)
    return Draw(permute(places, epochs, num_rows=num_rows, seed=seed), epochs)


def mixed(drawn: Draw, rows: Sequence[int], draws: Sequence[int], *, seed: int) -> Draw:
    """What the positions of a mix's epochs are, drawn as if they were rows: rows of its parts, one part after another.

    Each part is gone through whole, in a new order each time, before a row of it comes again.

    Args:
        drawn: of sum(draws) rows.
        rows: of each part, at least 1.
        draws: of each part in an epoch, at least 1.
        seed: of the run.

    Returns:
        The rows, and how often all rows of its part were gone through before each.
    """
    found, rounds = np.empty_like(drawn.rows), np.empty_like(drawn.epochs)
    first_row = first_draw = 0
    for part, (size, share) in enumerate(zip(rows, draws, strict=True)):
        mine = (drawn.rows >= first_draw) & (drawn.rows < first_draw + share)
        numbers = drawn.epochs[mine] * share + drawn.rows[mine] - first_draw
        rounds[mine], places = np.divmod(numbers, size)
        order = permute(places, rounds[mine], num_rows=size, seed=hash64(seed, part))
        found[mine] = first_row + order
        first_row, first_draw = first_row + size, first_draw + share
    return Draw(found, rounds)


def permute(places: Int64s, epochs: Int64s, *, num_rows: int, seed: int) -> Int64s:
    """Row at each place of each epoch: for one seed and epoch a bijection of [0, num_rows).

    Args:
        places: 0 <= place < num_rows.
        epochs: of the same shape.
        num_rows: at least 1.
        seed: any integer.
    """
    half = max(MIN_HALF_BITS, -(-(num_rows - 1).bit_length() // 2))
    keys = hash64s(np.full(epochs.shape, seed & _WORD, np.uint64), epochs.astype(np.uint64))
    rows = _feistel(places.astype(np.uint64), keys, half)
    while (outside := rows >= num_rows).any():
        rows[outside] = _feistel(rows[outside], keys[outside], half)
    return rows.astype(np.int64)


def _feistel(values: UInt64s, keys: UInt64s, half: int) -> UInt64s:
    """A bijection of [0, 4**half): each round is one, whatever the hash, because it can be undone."""
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (hash64s(keys, right, np.full_like(right, number)) & mask)
    return (left << shift) | right


def bits(drawn: Draw, *, seed: int) -> UInt64s:
    """64 random bits of each row in its epoch.

    Args:
        drawn: the rows.
        seed: of the run.
    """
    epochs, rows = drawn.epochs.astype(np.uint64), drawn.rows.astype(np.uint64)
    return hash64s(np.full_like(epochs, seed & _WORD), epochs, rows)


def fractions(drawn: Draw, count: int, *, seed: int) -> Float64s:
    """Random numbers of each row in its epoch, uniform in [0, 1): [batch of the rank, count].

    Args:
        drawn: the rows.
        count: numbers of a row; more of them leave the first ones as they are.
        seed: of the run.
    """
    number = np.arange(count, dtype=np.uint64)
    columns = np.broadcast_arrays(
        np.uint64(seed & _WORD), drawn.epochs[:, None].astype(np.uint64), drawn.rows[:, None].astype(np.uint64), number
    )
    return (hash64s(*columns) >> np.uint64(11)).astype(np.float64) / 2**53


def hash64s(*columns: UInt64s) -> UInt64s:
    """64 well mixed bits of each row of some columns of equal shape (the finalizer of SplitMix64, chained)."""
    state = np.zeros_like(columns[0])
    for column in columns:
        state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def hash64(*values: int) -> int:
    """`hash64s` of one row of integers of any sign: the same on every machine and in every process."""
    return int(hash64s(*(np.array([value & _WORD], np.uint64) for value in values))[0])
