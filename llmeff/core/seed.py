"""Derives independent seeds for the parts of a run from the single seed in its config."""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """Returns the seed of one part of a run, in [0, 2^63). Different names give independent seeds.

    >>> derive(0, "init") != derive(0, "data") != derive(1, "data")
    True
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
