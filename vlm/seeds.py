"""Hash functions that compute a seed from numbers such as step and rank, so that no random state needs to be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy.typing as npt

    Word = TypeVar("Word", int, npt.NDArray[Any])


def splitmix64(word: Word) -> Word:
    """Hash 64 bits with one step of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).

    Args:
        word: an integer of any size and sign, which is reduced modulo 2**64, or a uint64 array, whose elements are
            hashed.
    """
    word = _wrap(word + 0x9E3779B97F4A7C15)
    word = _wrap((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9)
    word = _wrap((word ^ (word >> 27)) * 0x94D049BB133111EB)
    return word ^ (word >> 31)


def _wrap(word: Word) -> Word:
    """Reduce an integer modulo 2**64. A uint64 array is returned unchanged, because numpy computes with such arrays
    modulo 2**64.
    """
    return word & (2**64 - 1) if isinstance(word, int) else word


def mix(*numbers: int) -> int:
    """Compute a 63-bit seed from several numbers. If a number changes, about half of the bits of the seed change.

    A sum of shifted numbers would not be enough, because torch's CPU generator uses only the low 32 bits of a seed.
    """
    state = 0
    for number in numbers:
        state = splitmix64(state + number)
    return state >> 1
