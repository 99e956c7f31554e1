"""Arrays without numbers, and the bytes that live as long as something refers to them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from llmeff.core.precision import BYTES

Backward = Callable[..., "tuple[Array | None, ...]"]
"""(gradient of the output, *saved arrays) to the gradients of the node's inputs."""

NUM_BYTES = {**BYTES, "int64": 8, "bool": 1}
"""Bytes of a number, by format."""


class Storage:
    """Bytes that live as long as something refers to them."""

    __slots__ = ("_live", "label", "num_bytes")

    def __init__(self, live: "Live", num_bytes: int, label: tuple[str, str]):
        self._live, self.num_bytes, self.label = live, num_bytes, label
        live.change(label, num_bytes)

    def __del__(self) -> None:
        self._live.change(self.label, -self.num_bytes)

    def beside(self, num_bytes: int) -> "Storage":
        """New bytes with the same label."""
        return Storage(self._live, num_bytes, self.label)

    def relabel(self, label: tuple[str, str]) -> None:
        """Changes what the bytes are for."""
        self._live.change(self.label, -self.num_bytes)
        self.label = label
        self._live.change(label, self.num_bytes)


class Live:
    """Counts the bytes that live now, those that lived at the peak, and the most of each label at any time."""

    def __init__(self) -> None:
        self.now: Counter[tuple[str, str]] = Counter()
        self.total = self.peak_total = 0
        self.peak: Counter[tuple[str, str]] = Counter()
        self.most: Counter[str] = Counter()
        self._by_label: Counter[str] = Counter()

    def change(self, label: tuple[str, str], num_bytes: int) -> None:
        """Counts bytes that begin to live; if negative, bytes that are freed."""
        self.now[label] += num_bytes
        self._by_label[label[0]] += num_bytes
        self.most[label[0]] = max(self.most[label[0]], self._by_label[label[0]])
        self.total += num_bytes
        if self.total > self.peak_total:
            self.peak_total, self.peak = self.total, self.now.copy()


@dataclass(slots=True)
class Array:
    """A tensor without its numbers. Views share their storage."""

    shape: tuple[int, ...]
    dtype: str
    storage: Storage
    node: "Node | None" = None
    """The operation that made it; None if no gradient flows there."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether its numbers are contiguous; those of some channels of several rows are not."""
        return self.shape[:1] == (1,) or self.size * NUM_BYTES[self.dtype] == self.storage.num_bytes

    def like(self) -> "Array":
        """A new array of its shape and format."""
        return Array(self.shape, self.dtype, self.storage.beside(self.size * NUM_BYTES[self.dtype]))

    def view(self, *shape: int) -> "Array":
        """The same bytes in another shape."""
        assert prod(shape) == self.size, (shape, self.shape)
        return Array(shape, self.dtype, self.storage, self.node)


@dataclass(slots=True)
class Node:
    """One operation, as backward meets it; without `backward`, a leaf that wants a gradient."""

    inputs: tuple["Node | None", ...] = ()
    saved: tuple[Array, ...] = ()
    backward: Backward | None = None
    replay: "Callable[[list[Array], Array], Array | None] | None" = None
    """Replaces `backward` in a part that is recomputed; its gradient comes in a list, so that it can be freed."""
    gradient: Array | None = None

    def accumulate(self, gradient: Array) -> None:
        """Adds to the gradient of the node's output, in place if the first one is contiguous, as PyTorch does."""
        if self.gradient is None:
            self.gradient = gradient
        elif not self.gradient.is_dense:
            self.gradient = self.gradient.like()


@dataclass(slots=True)
class Weight:
    """A parameter without its numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str
    is_trained: bool = True
    role: str | None = None
    """The kind of parameter, by which optimizers choose the update (`core.parameters.Role`); None: unknown."""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its bytes."""
        return self.size * NUM_BYTES[self.dtype]
