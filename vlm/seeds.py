"""Seeds from what they are for, so that no random state needs saving."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit seed that differs, in all its bits, for every tuple of numbers (splitmix64 finaliser, number by number).

    Torch's CPU generator looks at the low 32 bits of a seed alone, so sums and shifts of small numbers will not do.
    """
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & _MASK
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = ((x ^ (x >> shift)) * multiplier) & _MASK
        x ^= x >> 31
    return x >> 1
