"""Seeds computed from what they are used for, so that no random state needs saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy.typing as npt

    Word = TypeVar("Word", int, npt.NDArray[Any])


def splitmix64(word: Word) -> Word:
    """Hash 64 bits with one step of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).

    Args:
        word: an integer of any size and sign, taken modulo 2**64, or a uint64 array, hashed element by element.
    """
    word = _wrap(word + 0x9E3779B97F4A7C15)
    word = _wrap((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9)
    word = _wrap((word ^ (word >> 27)) * 0x94D049BB133111EB)
    return word ^ (word >> 31)


def _wrap(word: Word) -> Word:
    """Reduce an integer modulo 2**64; uint64 arrays wrap around by themselves."""
    return word & (2**64 - 1) if isinstance(word, int) else word


def mix(*numbers: int) -> int:
    """Compute a 63-bit seed that differs in all its bits for every tuple of numbers.

    Sums and shifts of small numbers are not enough: torch's CPU generator uses only the low 32 bits of a seed.
    """
    state = 0
    for number in numbers:
        state = splitmix64(state + number)
    return state >> 1
