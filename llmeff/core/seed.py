"""Independent seeds for the parts of a run, all functions of the one seed in its config."""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the part that the names describe; other names give an unrelated seed.

    >>> derive(0, "init") != derive(0, "data") != derive(1, "data")
    True
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
