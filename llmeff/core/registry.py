"""Registries of objects by name. Errors suggest the nearest known name."""

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(given: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the most similar known name, if any is similar, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names)}."


class Registry(Generic[T]):
    """Entries of one kind, by name.

    Args:
        kind: the word for an entry in errors, such as "optimizer".
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Adds an entry.

        Raises:
            ValueError: if the name is already registered.
        """
        if name in self._entries:
            raise ValueError(
                f"{self.kind} {name!r} is registered twice: {self._entries[name]!r} and {entry!r}. Rename one of them"
            )
        self._entries[name] = entry

    def unknown(self, name: object) -> str:
        """Returns the error message for an unknown name, or for a value that is not a string."""
        if not isinstance(name, str):
            return f"a {self.kind} needs a name. Known: {', '.join(self.names())}."
        return f"unknown {self.kind} {name!r}.{nearest(name, self._entries)}"

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(self.unknown(name))
        return self._entries[name]
