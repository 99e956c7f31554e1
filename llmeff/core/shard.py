"""Divides parameters among ranks. Each rank updates, keeps optimizer state for, and saves the parts that it owns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A range of elements of one flattened parameter."""

    name: str
    """The parameter's name."""
    start: int
    """Index of the first element."""
    stop: int
    """Index after the last element."""

    @property
    def size(self) -> int:
        """Number of elements in the slice."""
        return self.stop - self.start


Shard = tuple[Slice, ...]
"""The slices that one rank owns."""


def replicated(sizes: Mapping[str, int], ranks: int) -> list[Shard]:
    """Returns shards in which every rank owns all parameters.

    Args:
        sizes: number of elements of each parameter, in the model's order.
        ranks: number of ranks.
    """
    return [tuple(Slice(name=name, start=0, stop=size) for name, size in sizes.items())] * ranks


def whole_tensors(sizes: Mapping[str, int], ranks: int) -> list[Shard]:
    """Returns shards in which one rank owns each parameter as a whole.

    Parameters are assigned from the largest to the smallest, each to the rank with the fewest elements so far.

    >>> [[part.name for part in shard] for shard in whole_tensors({"a": 5, "b": 9, "c": 3}, 2)]
    [['b'], ['a', 'c']]
    """
    owners: dict[str, int] = {}
    loads = [0] * ranks
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return [
        tuple(Slice(name=name, start=0, stop=size) for name, size in sizes.items() if owners[name] == rank)
        for rank in range(ranks)
    ]


def split_group(sizes: Mapping[str, int], ranks: int, alignment: int = 1) -> list[Shard]:
    """Concatenates the parameters and gives each rank one part of `part_length` elements, with padding at the end.

    The padding belongs to no slice.

    >>> split_group({"a": 5, "b": 2}, 2)[1]
    (Slice(name='a', start=4, stop=5), Slice(name='b', start=0, stop=2))
    """
    length = part_length(sum(sizes.values()), ranks, alignment)
    begins = [0, *accumulate(sizes.values())]
    places = list(zip(sizes.items(), begins, strict=False))
    shards = []
    for rank in range(ranks):
        low, high = rank * length, (rank + 1) * length
        shards.append(
            tuple(
                Slice(name=name, start=max(0, low - begin), stop=min(size, high - begin))
                for (name, size), begin in places
                if begin < high and begin + size > low
            )
        )
    return shards


def part_length(size: int, ranks: int, alignment: int = 1) -> int:
    """Returns the number of elements in one rank's part, with padding.

    `size` is rounded up to a multiple of `alignment` and divided by the number of ranks. `alignment` must be a multiple
    of the number of ranks. The default, 1, stands for the number of ranks itself.
    """
    step = max(alignment, ranks)
    return -(-size // step) * step // ranks


def split_each(sizes: Mapping[str, int], ranks: int) -> list[Shard]:
    """Splits each flattened parameter into one equal part per rank. The last ranks' parts may be shorter or empty."""
    return [
        tuple(
            Slice(name=name, start=min(size, rank * length), stop=min(size, (rank + 1) * length))
            for name, size in sizes.items()
            for length in [part_length(size, ranks)]
        )
        for rank in range(ranks)
    ]


def split_rows(shapes: Mapping[str, Sequence[int]], ranks: int) -> list[Shard]:
    """Splits each parameter along its first dimension into equal numbers of rows, as FSDP2 does.

    The last ranks may own fewer rows, or none.
    """
    shards = []
    for rank in range(ranks):
        shard = []
        for name, shape in shapes.items():
            rows, width = shape[0], 1
            for length in shape[1:]:
                width *= length
            each = part_length(rows, ranks)
            shard.append(
                Slice(name=name, start=min(rows, rank * each) * width, stop=min(rows, (rank + 1) * each) * width)
            )
        shards.append(tuple(shard))
    return shards
