"""Base class of the laws of strategies with several ranks: collectives, gloo's copies and the loop's sums."""

from collections.abc import Iterable, Iterator

from llmeff.core.precision import BYTES
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Storage, Weight
from llmeff.cost.price import Kind
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload

_LOOP_BYTES = 8 + 8 + 4
"""Bytes that the training loop sums over the ranks in a step: the loss's divisor, the number of items, and the loss."""


class RankLaw(StrategyLaw):
    """The law of one of several ranks.

    Args:
        weights: all parameters, in the model's order.
        work: the step on this rank.
        ranks: the number of ranks.
        rank: the index of this rank.
    """

    def __init__(self, weights: Iterable[Weight], work: Workload, ranks: int, rank: int):
        check_tested("torch")
        super().__init__(weights, work.precision)
        self.ranks, self.rank = ranks, rank
        self.is_shared = ranks > 1
        self.updated_number_bytes = BYTES[work.precision.master or work.precision.parameters]
        """Bytes per element that the optimizer updates: of the master copy, or of the parameters if there is none."""
        self.parameter_number_bytes = BYTES[work.precision.parameters]
        """Bytes per element of a parameter or a gradient."""
        self._on_cpu = work.on_cpu

    def update(self) -> None:
        """Counts the training loop's all-reduces. Each strategy adds the communication of its optimizer update."""
        if self.ranks > 1:
            self.send("all_reduce", _LOOP_BYTES)

    def offload(self, kind: Kind, part: str, num_bytes: int) -> None:
        """Counts bytes that stay in CPU memory throughout the step. If the model is on a CPU, the peak includes them.

        Args:
            kind: the kind of cost.
            part: the part of the model that the bytes belong to.
            num_bytes: the number of bytes.
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
        """Counts a reduce-scatter of a buffer of `num_bytes`. Each rank gets one part of the sum."""
        self.send("reduce_scatter", num_bytes)
        self.copy(num_bytes)

    def copy(self, num_bytes: int) -> None:
        """Counts the temporary copy of `num_bytes` that gloo makes for a gather or scatter (on a CPU only)."""
        if self._on_cpu:
            self.make("bucket_bytes", num_bytes)

    def flatten(self, sizes: Iterable[int], number_bytes: int) -> Storage | None:
        """Makes the flat copy that joins tensors for a collective or an update. Returns None for a single tensor.

        Args:
            sizes: number of elements of each tensor. A single tensor is not copied.
            number_bytes: bytes per element.
        """
        pieces = list(sizes)
        return self.make("bucket_bytes", sum(pieces) * number_bytes) if len(pieces) > 1 else None


def in_buckets(sizes: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Splits sizes into buckets, in order. A bucket ends with the size that makes its sum exceed the limit."""
    bucket: list[int] = []
    for size in sizes:
        bucket.append(size)
        if sum(bucket) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
