"""Who this process is, and where caches lie, by the environment that a launcher and a user give."""

from pathlib import Path

import pytest

from llmeff.core.dist import World, cache_folder, world


@pytest.mark.parametrize(
    ("environment", "expected", "is_main"),
    [
        ({}, World(rank=0, local_rank=0, ranks=1), True),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, World(rank=3, local_rank=1, ranks=4), False),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, World(rank=0, local_rank=0, ranks=2), True),
    ],
)
def test_the_world_is_what_the_launcher_says(monkeypatch, environment, expected, is_main):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world() == expected
    assert world().is_main is is_main


@pytest.mark.parametrize(
    ("ours", "xdg", "expected"),
    [
        ("somewhere", "cache", "somewhere"),
        ("", "cache", "cache/llmeff"),
        ("", "", "home/.cache/llmeff"),
    ],
)
def test_the_cache_is_where_the_user_says(monkeypatch, ours, xdg, expected):
    monkeypatch.setenv("LLMEFF_CACHE", ours)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "home")
    assert cache_folder() == Path(expected)
