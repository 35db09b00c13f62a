"""Tests that SplitMix64 is equal for integers and arrays, and that `mix` gives the same seeds in every version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.worker.data.order import hash64, hash64s
from vlm.seeds import mix, splitmix64

words = st.integers(0, 2**64 - 1)


def test_splitmix64_gives_the_published_sequence() -> None:
    """Compare with the first outputs of the reference implementation of SplitMix64 for the seed 1234567."""
    step = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + n * step) for n in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.lists(words, min_size=1, max_size=9))
def test_splitmix64_of_an_array_equals_splitmix64_of_each_integer(values: list[int]) -> None:
    assert splitmix64(np.array(values, np.uint64)).tolist() == [splitmix64(value) for value in values]


@given(st.lists(words, min_size=1, max_size=5))
def test_hash64s_of_array_columns_equals_hash64_of_integers(values: list[int]) -> None:
    columns = [np.array([value], np.uint64) for value in values]
    assert hash64s(*columns).tolist() == [hash64(*values)]


@pytest.mark.parametrize(
    ("numbers", "seed"),
    [
        ((0,), 8147104208329303767),
        ((1, -2, 3), 6599607950584573848),
        ((7, 100, 2), 8185608538580845020),
        ((2**64 + 5,), 3567305580077179309),
    ],
)
def test_the_seed_function_mix_returns_the_same_seeds_as_in_earlier_versions(
    numbers: tuple[int, ...], seed: int
) -> None:
    """Compare with fixed values, because a change of `mix` would change the random numbers of every existing run."""
    assert mix(*numbers) == seed
