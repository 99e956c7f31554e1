"""Patterns, such as `sliding*3+softmax`, that assign a mixer to each layer."""

from collections.abc import Iterator, Mapping
from itertools import cycle

from llmeff.attention.mixer import MixerConfig
from llmeff.core.registry import nearest


def _runs(pattern: str) -> list[tuple[str, int | None]]:
    """Returns the mixer names in a pattern, each with its number of consecutive layers.

    A name without `*` has the number 1. The number is None if no positive number follows the `*`.
    """
    found: list[tuple[str, int | None]] = []
    for run in pattern.split("+"):
        name, times, count = (part.strip() for part in run.partition("*"))
        number = int(count) if count.isdecimal() else 0
        found.append((name, 1 if not times else number or None))
    return found


def problems(pattern: str, settings: Mapping[str, MixerConfig], num_layers: int) -> list[str]:
    """Returns one message for each error in the pattern, and for each mixer in `settings` that the pattern lacks."""
    runs, found = _runs(pattern), []
    for name, count in runs:
        if name not in settings and name not in MixerConfig.registry:
            known = [*MixerConfig.registry.names(), *settings]
            found.append(f"pattern {pattern!r}: there is no mixer {name!r}.{nearest(name, known)}")
        if count is None:
            found.append(
                f"pattern {pattern!r}: give a positive number after '*' for {name!r}, as in 'sliding*3+softmax'"
            )
    length = sum(count or 0 for _, count in runs)
    if not found and num_layers % length:
        found.append(f"pattern {pattern!r} has {length} layers, which does not divide num_layers {num_layers}")
    found += [
        f"mixers.{name}: the pattern {pattern!r} does not name this mixer; remove it or add it to the pattern"
        for name in settings
        if name not in dict(runs)
    ]
    return found


def mixers(pattern: str, settings: Mapping[str, MixerConfig]) -> Iterator[MixerConfig]:
    """Yields the mixer of each layer, starting at the first. Repeats the pattern, which must be valid, without end.

    >>> from itertools import islice
    >>> from llmeff.attention import Softmax
    >>> [own.name for own in islice(mixers("plain*2+softmax", {"plain": Softmax(qk_norm=True)}), 4)]
    ['softmax', 'softmax', 'softmax', 'softmax']
    """
    return cycle(
        [
            settings[name] if name in settings else MixerConfig.registry[name]()
            for name, count in _runs(pattern)
            for _ in range(count or 0)
        ]
    )
