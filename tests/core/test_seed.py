"""Seeds of parts: the same for the same names, in every process and version; unrelated for others."""

import itertools

import pytest

from llmeff.core.seed import derive


@pytest.mark.parametrize(
    ("seed", "names", "digest"),  # by `printf 0/init | sha256sum`
    [(0, ("init",), 0x2A29A3E290B9715C), (7, ("train", 3), 0x2F6351E84D061F86)],
)
def test_seeds_never_change(seed, names, digest):
    assert derive(seed, *names) == digest >> 1


def test_parts_and_seeds_are_told_apart():
    parts = [("init",), ("data",), ("train", 0), ("train", 1), ("train", 10), ("train1", 0)]
    seeds = [derive(seed, *names) for seed, names in itertools.product((0, 1, 10, -1), parts)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
