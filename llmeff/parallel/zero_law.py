"""What each stage of DeepSpeed's ZeRO keeps and sends in a step, as the library (0.19) does it."""

from collections import Counter, deque
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from llmeff.core.shard import Shard, part_length, split_group
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Array, Storage, Weight
from llmeff.cost.workload import Workload
from llmeff.parallel.rank_law import RankLaw, in_buckets

if TYPE_CHECKING:
    from llmeff.parallel.zero import DeepSpeed

ALIGNMENT = 2
"""ZeRO-1 and -2 pad a group of parameters to a multiple of so many numbers a rank."""
_DOUBLE = 8
"""Bytes of a number of a norm: a slice of the gradients is copied into this format at a time."""
_ALL_AT_ONCE = 500_000_000
"""Numbers that stage 0 sums at a time."""


class ZeroLaw(RankLaw):
    """What the stages share.

    Args:
        weights: the parameters, in the model's order.
        groups: the trained ones, by the optimizer's groups.
        work: what a step does on the rank.
        config: the stage.
        rank: this one.
    """

    def __init__(
        self, weights: list[Weight], groups: list[list[Weight]], work: Workload, config: "DeepSpeed", rank: int
    ):
        check_tested("deepspeed")
        super().__init__(weights, work, config.ranks, rank)
        self._groups = groups
        self._config = config
        self._is_wider = self.wide != self.narrow
        self._accumulates = work.num_micro_batches > 1
        self._limit = config.bucket_size(sum(weight.size for weight in self.weights))
        self._bucket: list[Weight] = []
        self.updates_on_host = config.offload_optimizer
        self._keep_state = self.offload if config.offload_optimizer else self.keep
        self._keep_parameters = self.offload if config.offload_parameters else self.keep

    @property
    def _num_in_bucket(self) -> int:
        return sum(weight.size for weight in self._bucket)

    def _widen(self, num_pieces: int, size: int) -> Iterator[None]:
        """A group's gradients in one piece, in the format of what is updated, while that is done."""
        piece = self.flatten([size, *[0] * (num_pieces - 1)], self.narrow)
        if self._is_wider:
            piece = self._widened(piece, size)
        yield
        del piece

    def _widened(self, narrow: Storage | None, size: int) -> Storage:
        wide = self.make("bucket_bytes", size * self.wide)
        del narrow
        return wide


class SumLaw(ZeroLaw):
    """Stage 0: gradients are summed at the end, in one flat copy."""

    def end_backward(self) -> None:
        """With the last micro-batch all that was added up is summed over the ranks."""
        if self.is_last:
            for sizes in in_buckets([weight.size for weight in self.weights], _ALL_AT_ONCE):
                flat = self.flatten(sizes, self.narrow)
                self.send("all_reduce", sum(sizes) * self.narrow)
                del flat


class FlatLaw(ZeroLaw):
    """Stages 1 and 2: each group is one flat tensor, of which a rank updates a slice.

    Gradients are copied into a bucket as they come (stage 1: at the end). A full bucket is summed by way of a copy, and
    whole gradients of the parameters of which this rank has a part are copied out of it.
    """

    def __init__(
        self, weights: list[Weight], groups: list[list[Weight]], work: Workload, config: "DeepSpeed", rank: int
    ):
        super().__init__(weights, groups, work, config, rank)
        alignment = ALIGNMENT * self.ranks
        sizes = [{weight.name: weight.size for weight in group} for group in groups]
        self._lengths = [part_length(sum(own.values()), self.ranks, alignment) for own in sizes]
        shards = [split_group(own, self.ranks, alignment) for own in sizes]
        self._own: list[Shard] = [by_rank[rank] for by_rank in shards]
        self._slices = {part.name: part.size for shard in self._own for part in shard}
        self._owners: dict[str, list[tuple[int, int]]] = {}
        for by_rank in shards:
            for owner, shard in enumerate(by_rank):
                for part in shard:
                    self._owners.setdefault(part.name, []).append((owner, part.size))
        touched = sum(weight.size for weight in self.weights if weight.name in self._slices)
        self._num_touched_bytes = touched * self.narrow
        lengths = zip(self._own, self._lengths, strict=True)
        self._num_padding = sum(length - sum(part.size for part in shard) for shard, length in lengths)
        self._sum: Storage | None = None
        self._new: Storage | None = None
        self._buffer: Storage | None = None

    def add_resident(self) -> None:
        """The flat groups, this rank's slices for the update, and what offloading goes by way of."""
        self.add_frozen()
        largest = max(weight.size for weight in self.weights)
        for length in self._lengths:
            self.keep("parameter_bytes", "flat", length * self.ranks * self.narrow)
            self._keep_state("master_bytes", "flat", length * self.wide)
            if self._config.offload_optimizer:
                self.offload("gradient_bytes", "flat", length * self.wide)
                if self._on_cpu:
                    self.hold("bucket_bytes", length * self.narrow)
        if self._config.offload_optimizer:
            self.hold("bucket_bytes", (2 if self._on_cpu else 1) * largest * self.narrow)
            if self._accumulates:
                self.offload("gradient_bytes", "earlier micro-batches", self._num_touched_bytes)

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Into the bucket, or at stage 1 to the others until the end."""
        if self._buffer is None:
            num_buckets = 2 if self._config.overlap_comm else 1
            self._buffer = self.make("bucket_bytes", num_buckets * self._limit * self.narrow)
        super().on_gradient(weight, gradient)
        if self._config.stage == 2 or (self._config.overlap_comm and self.is_last):
            self._add(weight)

    def _add(self, weight: Weight) -> None:
        if self._num_in_bucket + weight.size > self._limit:
            self._reduce()
        if weight.size <= self._limit:
            self.whole.pop(weight.name, None)
        self._bucket.append(weight)

    def _reduce(self) -> None:
        owned = [place for weight in self._bucket for place in self._owners[weight.name]]
        pieces = [sum(size for _, size in run) for _, run in groupby(owned, key=lambda place: place[0])]
        for sizes in in_buckets(pieces, self._limit):
            flat = self.flatten(sizes, self.narrow)
            self.send("all_reduce", sum(sizes) * self.narrow)
            del flat
        for weight in self._bucket:
            if weight.name in self._slices:
                self._take(self._slices[weight.name])
            self.whole.pop(weight.name, None)
        self._bucket.clear()

    def _take(self, size: int) -> None:
        """A reduced gradient of which this rank has a part."""
        if not self._config.offload_optimizer:
            self._new = self._new or self.make("gradient_bytes", self._num_touched_bytes)
        elif self.is_last:
            self.make("bucket_bytes", size * _DOUBLE)
            self.make("bucket_bytes", size * self.wide if self._is_wider else 0)

    def end_backward(self) -> None:
        """The rest is summed; then the buckets go."""
        if self._config.stage == 1 and not self.is_last:
            return
        if self._config.stage == 1 and not self._config.overlap_comm:
            for group in self._groups:
                for weight in group:
                    self._add(weight)
        self._reduce()
        self._buffer = None
        self._sum = self._sum or self._new
        self._new = None
        if self.is_last and not self._config.offload_optimizer:
            self.hold("padding", self._num_padding * self.narrow)

    def gradients(self) -> Counter[str]:
        """What was copied out of the buckets."""
        if self._config.offload_optimizer:
            return Counter()
        touched = self._num_touched_bytes if self._slices else 0
        return Counter({"touched": touched, "padding": self._num_padding * self.narrow})

    def update(self) -> None:
        """Norms, then one group after another; at the end each is gathered."""
        super().update()
        for _ in self._groups:
            self.send("all_reduce", 4)
        if self._is_wider:
            self.send("all_reduce", 1)  # whether any gradient is not finite
        if not self._config.offload_optimizer:
            self.make("bucket_bytes", max(self._slices.values(), default=0) * _DOUBLE)
            for shard, length in zip(self._own, self._lengths, strict=True):
                is_padded = sum(part.size for part in shard) < length
                for _ in self._widen(len(shard) + is_padded, length):
                    pass
        self._sum = None
        self.drop("padding")
        if self.ranks > 1:
            for length in self._lengths:
                self.gather(length * self.ranks * self.narrow)

    def updated(self) -> list[Weight]:
        """A flat slice of each group."""
        dtype = self.formats.master or self.formats.parameters
        return [Weight(f"group {i}", (length,), dtype, "flat") for i, length in enumerate(self._lengths)]


class GatheredLaw(ZeroLaw):
    """Stage 3: a part of every parameter, put together for its uses as DeepSpeed's coordinator decides.

    It knows the order of uses from the step before. At each use it gathers ahead, all in one buffer, and afterwards lets
    a parameter go that is not used again soon.
    """

    replaces_linear = True  # zero/linear.py, for as long as the process lives

    def __init__(
        self, weights: list[Weight], groups: list[list[Weight]], work: Workload, config: "DeepSpeed", rank: int
    ):
        super().__init__(weights, groups, work, config, rank)
        sizes = {weight.name: weight.size for weight in self.every}
        self._parts = {name: part_length(size, self.ranks) for name, size in sizes.items()}
        self._sizes = sizes
        self._stays = {name for name, size in sizes.items() if size <= config.persistence_threshold}
        self._trace: list[str] = []
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._whole: dict[str, Storage | None] = dict.fromkeys(self._stays)
        self._in_flight: dict[str, tuple[list[str], Storage]] = {}
        self._queue = deque((at, name) for at, name in enumerate(self._trace) if name != _AROUND)
        self._fetched_until: Counter[str] = Counter()
        self._num_uses = 0
        self._num_there = 0
        self._current: str | None = None
        self._is_ahead = False

    def set_use_order(self, uses: list[tuple[str, bool]]) -> None:
        """The order of modules, forward and backward."""
        self._trace = list(_modules(uses))

    def _padded(self, name: str) -> int:
        return self._parts[name] * self.ranks * self.narrow

    def add_resident(self) -> None:
        """StrategyInputs of parameters, of their updated copies and of gradients, and the bucket."""
        for weight in self.every:
            if weight.name in self._stays:
                self.hold("gathered_bytes", weight.num_bytes)
            if not weight.is_trained:
                self._keep_parameters("frozen_bytes", weight.part, self._parts[weight.name] * self.narrow)
        for weight in self.weights:
            length = self._parts[weight.name]
            self._keep_parameters("parameter_bytes", weight.part, length * self.narrow)
            self._keep_state("master_bytes", weight.part, length * self.wide)
            self._keep_state("gradient_bytes", weight.part, length * self.narrow)
            if self._config.offload_optimizer:
                self.offload("gradient_bytes", weight.part, length * self.wide)
        self.hold("bucket_bytes", self._limit * self.narrow)

    def begin_micro_batch(self, is_last: bool) -> None:
        """The order begins anew."""
        super().begin_micro_batch(is_last)
        self._begin_pass()

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """What was used before may go; this is fetched, and more ahead."""
        if not self._is_ahead:
            self._enter()
        self._is_ahead = False

    def _enter(self) -> None:
        """The next module with a weight of its own, and those around it that are entered with it."""
        self._release()
        while self._trace[self._num_uses] == _AROUND:
            self._num_uses += 1
            self._look_ahead()
        self._fetch(self._trace[self._num_uses])

    def _fetch(self, name: str) -> None:
        at = self._num_uses
        self._current = name
        if name not in self._whole and name not in self._in_flight:
            self._whole[name] = self._gather([name])
        if name in self._in_flight:
            names, buffer = self._in_flight.pop(name)
            for other in names:
                num_bytes = self._sizes[other] * self.narrow if self.ranks > 1 else 0
                self._whole[other] = self.make("gathered_bytes", num_bytes)
            names.clear()  # all are taken out at once; the buffer stays until each was used
            del buffer
        if self._fetched_until[name] <= at and self._queue:
            self._fetched_until[name] = self._queue.popleft()[0] + 1
        self._look_ahead()
        self._num_uses += 1

    def _look_ahead(self) -> None:
        most = min(self._config.max_live_parameters - self._num_there, self._config.prefetch_bucket_size)
        ahead: list[str] = []
        num_ahead = 0
        while self._queue and num_ahead < most:
            at, name = self._queue.popleft()
            self._fetched_until[name] = max(self._fetched_until[name], at + 1)
            if name not in self._whole and name not in self._in_flight and name not in ahead:
                ahead.append(name)
                num_ahead += self._sizes[name]
        if len(ahead) == 1:
            self._whole[ahead[0]] = self._gather(ahead)
        elif ahead:
            buffer = self._gather(ahead)
            self._in_flight |= dict.fromkeys(ahead, (ahead, buffer))

    def _gather(self, names: list[str]) -> Storage:
        self._num_there += sum(self._sizes[name] for name in names)
        if self.ranks == 1:
            return self.make("gathered_bytes", 0)  # the one part is the parameter
        num_bytes = sum(map(self._padded, names))
        buffer = self.make("gathered_bytes", num_bytes)
        self.gather(num_bytes)
        return buffer

    def _release(self) -> None:
        """Lets what was used last go, unless it is used again within the distance."""
        name, self._current = self._current, None
        if name is None or name in self._stays or self._fetched_until[name] > self._num_uses + 1:
            return
        distance = 0
        for later in self._trace[self._num_uses :]:
            if distance >= self._config.max_reuse_distance:
                break
            if later == name:
                return
            distance += self._sizes.get(later, 0)
        self._whole.pop(name, None)
        self._num_there -= self._sizes[name]

    def end_forward(self) -> None:
        """The last module is left, and backward enters it again before its loss."""
        self._enter()
        self._is_ahead = True

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Into the bucket, where there is room for it."""
        super().on_gradient(weight, gradient)
        if self._bucket and self._num_in_bucket + weight.size > self._limit:
            self._reduce()
        if self._num_in_bucket + weight.size <= self._limit:
            self.whole.pop(weight.name)
        self._bucket.append(weight)

    def _reduce(self) -> None:
        if not self._bucket:
            return
        num_bytes = sum(self._padded(weight.name) for weight in self._bucket)
        is_padded = num_bytes != self._num_in_bucket * self.narrow
        flat = self.make("bucket_bytes", num_bytes) if is_padded or len(self._bucket) > 1 else None
        self.scatter(num_bytes)
        del flat
        for weight in self._bucket:
            self.whole.pop(weight.name, None)
        self._bucket.clear()

    def end_backward(self) -> None:
        """The rest is summed; then the first module goes too, which has no gradient to hand on that would say so."""
        self._reduce()
        self._begin_pass()

    def update(self) -> None:
        """Norms, then one group after another; what is never split is gathered again."""
        super().update()
        offloads = self._config.offload_optimizer
        for _ in self._groups:
            self.send("all_reduce", 4 if offloads else _DOUBLE)
        if not offloads:
            self.make("bucket_bytes", max(self._parts[weight.name] for weight in self.weights) * _DOUBLE)
            for group in self._groups:
                for _ in self._widen(len(group), sum(self._parts[weight.name] for weight in group)):
                    pass
        if self._stays:
            self.gather(sum(map(self._padded, self._stays)))

    def updated(self) -> list[Weight]:
        """The parts of each group, one behind another."""
        dtype = self.formats.master or self.formats.parameters
        lengths = [sum(self._parts[weight.name] for weight in group) for group in self._groups]
        return [Weight(f"group {i}", (length,), dtype, "flat") for i, length in enumerate(lengths)]


_AROUND = ""
"""In the order of modules, one without weights of its own."""


def _modules(uses: list[tuple[str, bool]]) -> Iterator[str]:
    """The weights in the order of their modules, which are entered from the outermost inwards."""
    inside: list[str] = []
    was_backward = False
    for name, in_backward in uses:
        names = name.split(".")[:-2]  # of the modules around the weight's own
        around = ["", *(".".join(names[: i + 1]) for i in range(len(names)) if not _is_list(names, i))]
        if in_backward != was_backward:
            inside = []
        yield from (_AROUND for module in around if module not in inside)
        yield name
        inside, was_backward = around, in_backward


def _is_list(names: list[str], at: int) -> bool:
    return at + 1 < len(names) and names[at + 1].isdigit()
