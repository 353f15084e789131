"""A seeded permutation of `range(n)` that is computed element by element: no table, whatever n.

A Feistel network over the smallest even number of bits that holds n is a bijection of that power of two; values that fall outside
`range(n)` are sent through it again until they fall inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains,
CT-RSA 2002).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's finaliser on Python ints."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class Permutation:
    """Pseudo-random permutation of `range(size)`.

    Args:
        size: number of elements, at least 1.
        seed, epoch: two ints that choose the permutation.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs size >= 1, got {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        key = _mix((_mix(seed & _MASK64) + epoch) & _MASK64)
        self._keys = []
        for _ in range(_ROUNDS):
            key = _mix(key)
            self._keys.append(np.uint64(key))

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Elements at `positions` (any shape, each in `[0, size)`), int64."""
        values = self._encrypt(positions.astype(np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ (mixed & mask)
        return (left << bits) | right
