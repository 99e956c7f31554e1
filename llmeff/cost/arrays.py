"""Arrays without values, and storages whose bytes are in memory as long as something refers to them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from llmeff.core.precision import BYTES

Backward = Callable[..., "tuple[Array | None, ...]"]
"""Function from (gradient of the output, *saved arrays) to the gradients of the node's inputs."""

NUM_BYTES = {**BYTES, "int64": 8, "bool": 1}
"""Bytes per element, by dtype."""


class Storage:
    """Bytes that are in memory as long as something refers to this object."""

    __slots__ = ("_live", "label", "num_bytes")

    def __init__(self, live: "Live", num_bytes: int, label: tuple[str, str]):
        self._live, self.num_bytes, self.label = live, num_bytes, label
        live.change(label, num_bytes)

    def __del__(self) -> None:
        self._live.change(self.label, -self.num_bytes)

    def beside(self, num_bytes: int) -> "Storage":
        """Returns a new storage of `num_bytes` with the same label."""
        return Storage(self._live, num_bytes, self.label)

    def relabel(self, label: tuple[str, str]) -> None:
        """Moves the bytes from the old label to a new label, under which they are then counted."""
        self._live.change(self.label, -self.num_bytes)
        self.label = label
        self._live.change(label, self.num_bytes)


class Live:
    """Counts bytes in memory by label: now, at the moment of the peak, and the maximum of each label over time."""

    def __init__(self) -> None:
        self.now: Counter[tuple[str, str]] = Counter()
        self.total = self.peak_total = 0
        self.peak: Counter[tuple[str, str]] = Counter()
        self.most: Counter[str] = Counter()
        self._by_label: Counter[str] = Counter()

    def change(self, label: tuple[str, str], num_bytes: int) -> None:
        """Counts an allocation of `num_bytes`, or a release of memory if `num_bytes` is negative."""
        self.now[label] += num_bytes
        self._by_label[label[0]] += num_bytes
        self.most[label[0]] = max(self.most[label[0]], self._by_label[label[0]])
        self.total += num_bytes
        if self.total > self.peak_total:
            self.peak_total, self.peak = self.total, self.now.copy()


@dataclass(slots=True)
class Array:
    """A tensor without values. Views share their storage."""

    shape: tuple[int, ...]
    dtype: str
    storage: Storage
    node: "Node | None" = None
    """The operation that made the array. None if no gradient flows to it."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether the elements are contiguous in memory, unlike in a view of some channels of several rows."""
        return self.shape[:1] == (1,) or self.size * NUM_BYTES[self.dtype] == self.storage.num_bytes

    def like(self) -> "Array":
        """Returns a new array of the same shape and dtype."""
        return Array(self.shape, self.dtype, self.storage.beside(self.size * NUM_BYTES[self.dtype]))

    def view(self, *shape: int) -> "Array":
        """Returns a view with another shape and the same storage."""
        assert prod(shape) == self.size, (shape, self.shape)
        return Array(shape, self.dtype, self.storage, self.node)


@dataclass(slots=True)
class Node:
    """An operation in the backward graph. A node without `backward` and `replay` is a leaf."""

    inputs: tuple["Node | None", ...] = ()
    saved: tuple[Array, ...] = ()
    backward: Backward | None = None
    replay: "Callable[[list[Array], Array], Array | None] | None" = None
    """Replaces `backward` in recomputed layers. It receives the gradient in a list, so that it can free it."""
    gradient: Array | None = None

    def accumulate(self, gradient: Array) -> None:
        """Adds `gradient` to the sum of earlier gradients: in place if the sum is contiguous, as PyTorch does."""
        if self.gradient is None:
            self.gradient = gradient
        elif not self.gradient.is_dense:
            self.gradient = self.gradient.like()


@dataclass(slots=True)
class Weight:
    """A parameter without values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str
    is_trained: bool = True
    role: str | None = None
    """The kind of parameter, by which optimizers choose the update (`core.parameters.Role`). None if unknown."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return self.size * NUM_BYTES[self.dtype]
