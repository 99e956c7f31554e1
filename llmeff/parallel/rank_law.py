"""What all strategies of many processes share in their price: collectives, the copies that gloo makes, own sums."""

from collections.abc import Iterable, Iterator

from llmeff.core.precision import BYTES
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Storage, Weight
from llmeff.cost.price import Kind
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload

_OWN_BYTES = 8 + 8 + 4
"""What the loop itself sums over the ranks in a step: what the loss is divided by, the number of items, and the loss."""


class RankLaw(StrategyLaw):
    """One rank of several.

    Args:
        weights: the parameters, in the model's order.
        work: what a step does on the rank.
        ranks: how many there are.
        rank: this one.
    """

    def __init__(self, weights: Iterable[Weight], work: Workload, ranks: int, rank: int):
        check_tested("torch")
        super().__init__(weights, work.precision)
        self.ranks, self.rank = ranks, rank
        self.is_shared = ranks > 1
        self.wide = BYTES[work.precision.master or work.precision.parameters]
        """Bytes of a number of what is updated."""
        self.narrow = BYTES[work.precision.parameters]
        """Bytes of a number of a parameter, and of its gradient."""
        self._on_cpu = work.on_cpu

    def update(self) -> None:
        """Our own sums; a strategy's come with them."""
        if self.ranks > 1:
            self.send("all_reduce", _OWN_BYTES)

    def offload(self, kind: Kind, part: str, num_bytes: int) -> None:
        """Bytes that live in CPU memory at every moment: counted as what they are, in the peak only where all is there."""
        if self._on_cpu:
            self.keep(kind, part, num_bytes)
        else:
            self.counts[kind, part] += num_bytes

    def gather(self, num_bytes: int) -> None:
        """All ranks' parts are put together in a buffer of so many bytes."""
        self.send("all_gather", num_bytes)
        self.copy(num_bytes)

    def scatter(self, num_bytes: int) -> None:
        """A buffer of so many bytes is summed, and each rank gets its part."""
        self.send("reduce_scatter", num_bytes)
        self.copy(num_bytes)

    def copy(self, num_bytes: int) -> None:
        """Gloo gathers into, and scatters from, a copy, which goes with the call."""
        if self._on_cpu:
            self.make("bucket_bytes", num_bytes)

    def flatten(self, sizes: Iterable[int], width: int) -> Storage | None:
        """Numbers put one behind another for a collective or an update; what is in one piece is not copied."""
        pieces = list(sizes)
        return self.make("bucket_bytes", sum(pieces) * width) if len(pieces) > 1 else None


def in_buckets(sizes: Iterable[int], limit: int) -> Iterator[list[int]]:
    """Pieces in the order given; a bucket is closed by the piece that makes it exceed the limit."""
    bucket: list[int] = []
    for size in sizes:
        bucket.append(size)
        if sum(bucket) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
