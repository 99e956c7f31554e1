"""What the prices of all strategies of several ranks share: collectives, gloo's copies and the loop's sums."""

from collections.abc import Iterable, Iterator

from llmeff.core.precision import BYTES
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Storage, Weight
from llmeff.cost.price import Kind
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload

_LOOP_BYTES = 8 + 8 + 4
"""Bytes that the loop itself sums over the ranks in a step: the loss's divisor, the number of items, and the loss."""


class RankLaw(StrategyLaw):
    """The law of one rank of several.

    Args:
        weights: all parameters, in the model's order.
        work: what a step does on the rank.
        ranks: how many ranks there are.
        rank: the index of this rank.
    """

    def __init__(self, weights: Iterable[Weight], work: Workload, ranks: int, rank: int):
        check_tested("torch")
        super().__init__(weights, work.precision)
        self.ranks, self.rank = ranks, rank
        self.is_shared = ranks > 1
        self.updated_number_bytes = BYTES[work.precision.master or work.precision.parameters]
        """Bytes of a number that is updated: of the master copy, or of a parameter if there is none."""
        self.parameter_number_bytes = BYTES[work.precision.parameters]
        """Bytes of a number of a parameter, and of a gradient."""
        self._on_cpu = work.on_cpu

    def update(self) -> None:
        """Counts the sums of the loop; a strategy adds those of its update."""
        if self.ranks > 1:
            self.send("all_reduce", _LOOP_BYTES)

    def offload(self, kind: Kind, part: str, num_bytes: int) -> None:
        """Counts bytes that live in CPU memory throughout the step; on a CPU run they are in the peak too.

        Args:
            kind: what the bytes are.
            part: the part of the model that they belong to.
            num_bytes: how many.
        """
        if self._on_cpu:
            self.keep(kind, part, num_bytes)
        else:
            self.counts[kind, part] += num_bytes

    def gather(self, num_bytes: int) -> None:
        """Counts an all-gather of all ranks' parts into a buffer of `num_bytes`."""
        self.send("all_gather", num_bytes)
        self.copy(num_bytes)

    def scatter(self, num_bytes: int) -> None:
        """Counts a reduce-scatter: a buffer of `num_bytes` is summed over the ranks, and each rank gets its part."""
        self.send("reduce_scatter", num_bytes)
        self.copy(num_bytes)

    def copy(self, num_bytes: int) -> None:
        """Counts the copy of `num_bytes` that gloo gathers into or scatters from, and frees at once."""
        if self._on_cpu:
            self.make("bucket_bytes", num_bytes)

    def flatten(self, sizes: Iterable[int], number_bytes: int) -> Storage | None:
        """Makes the copy that joins tensors for a collective or an update; None for one tensor, which is not copied.

        Args:
            sizes: how many numbers each tensor has.
            number_bytes: bytes of a number.
        """
        pieces = list(sizes)
        return self.make("bucket_bytes", sum(pieces) * number_bytes) if len(pieces) > 1 else None


def in_buckets(sizes: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Splits sizes into buckets, in their order; the size that makes a bucket exceed the limit is its last."""
    bucket: list[int] = []
    for size in sizes:
        bucket.append(size)
        if sum(bucket) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
