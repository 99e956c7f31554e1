"""Shuffling by a pseudo-random permutation that needs neither state nor a table in memory."""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Number of rounds of the cipher. With four rounds, permutations of few elements would show a visible structure."""


def permuted(indices: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Applies a pseudo-random permutation of 0 ... size - 1 to the indices. Each (seed, epoch) has its own permutation.

    The permutation is the generalized Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
    (CT-RSA 2002, section 5), on a x b >= size elements, with a and b near sqrt(size). Results outside the range are
    enciphered again (cycle walking). The round function is the finalizer of SplitMix64 (Steele, Lea and Flood 2014).

    Args:
        indices: the indices to permute, each in [0, size).
        size: number of elements in the permutation.
        seed: the run's seed.
        epoch: index of the epoch, from 0.
    """
    a = int(np.ceil(np.sqrt(size)))
    b = -(-size // a)
    keys = np.frombuffer(hashlib.sha512(f"{seed}/{epoch}".encode()).digest(), dtype="<u8")
    result = _encipher(indices.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _encipher(result[outside], a, b, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _encipher(x: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = np.divmod(x, np.uint64(b))
    for turn in range(0, ROUNDS, 2):
        left = (left + _mix(right, keys[turn]) % np.uint64(a)) % np.uint64(a)
        right = (right + _mix(left, keys[turn + 1]) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
