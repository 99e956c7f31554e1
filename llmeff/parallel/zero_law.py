"""Laws of DeepSpeed's ZeRO stages: what a rank keeps and sends in a step, as in version 0.19 of the library."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from llmeff.core.shard import Shard, part_length, split_group
from llmeff.core.tested import check_tested
from llmeff.cost.arrays import Array, Storage, Weight
from llmeff.cost.workload import Workload
from llmeff.parallel.rank_law import RankLaw, in_buckets

ALIGNMENT = 2
"""ZeRO-1 and ZeRO-2 pad a rank's slice of a group to a multiple of this many elements."""
_DOUBLE = 8
"""Bytes of a float64. DeepSpeed casts gradients to float64 for their norm, one slice at a time."""
_ALL_AT_ONCE = 500_000_000
"""Elements of gradients that stage 0 sums in one collective. The tensor that exceeds the limit is included."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """The fields of `DeepSpeed` that determine the price of a step. Sizes are in elements, not bytes."""

    ranks: int
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    overlap_comm: bool
    bucket_size: int
    """Largest number of gradient elements in a bucket."""
    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int
    persistence_threshold: int


class ZeroLaw(RankLaw):
    """Base class of the laws of all stages.

    Args:
        weights: all parameters, in the model's order.
        groups: the trained parameters of each optimizer group.
        work: the step on this rank.
        settings: the stage, offloading and bucket sizes.
        rank: the index of this rank.
    """

    def __init__(
        self, weights: list[Weight], groups: list[list[Weight]], work: Workload, settings: ZeroSettings, rank: int
    ):
        check_tested("deepspeed")
        super().__init__(weights, work, settings.ranks, rank)
        self._groups = groups
        self._settings = settings
        self._is_cast = self.updated_number_bytes != self.parameter_number_bytes
        self._accumulates = work.num_micro_batches > 1
        self._limit = settings.bucket_size
        self._bucket: list[Weight] = []
        self.updates_on_host = settings.offload_optimizer
        self._keep_state = self.offload if settings.offload_optimizer else self.keep
        self._keep_parameters = self.offload if settings.offload_parameters else self.keep

    @property
    def _num_in_bucket(self) -> int:
        return sum(weight.size for weight in self._bucket)

    def _copy_gradients(self, num_pieces: int, size: int) -> None:
        """Joins a group's gradients into one flat tensor, and casts that to the dtype of the update.

        Args:
            num_pieces: number of tensors to join.
            size: total number of elements of these tensors.
        """
        joined = self.flatten([size, *[0] * (num_pieces - 1)], self.parameter_number_bytes)
        if self._is_cast:
            self.make("bucket_bytes", size * self.updated_number_bytes)
        del joined


class SumLaw(ZeroLaw):
    """Stage 0: at the end of backward, a flat copy of the gradients is summed over the ranks."""

    def end_backward(self) -> None:
        """After the last micro-batch, sums all gradients over the ranks."""
        if self.is_last:
            for sizes in in_buckets([weight.size for weight in self.weights], _ALL_AT_ONCE):
                flat = self.flatten(sizes, self.parameter_number_bytes)
                self.send("all_reduce", sum(sizes) * self.parameter_number_bytes)
                del flat


class FlatLaw(ZeroLaw):
    """Stages 1 and 2: each group is one flat tensor, and each rank updates a slice of it.

    Stage 2 copies each gradient to a bucket as soon as the gradient is ready. Stage 1 does so at the end of backward. A
    full bucket is copied and summed over the ranks. If a rank owns a slice of a parameter, it keeps a copy of the
    parameter's whole gradient.
    """

    def __init__(
        self, weights: list[Weight], groups: list[list[Weight]], work: Workload, settings: ZeroSettings, rank: int
    ):
        super().__init__(weights, groups, work, settings, rank)
        alignment = ALIGNMENT * self.ranks
        sizes = [{weight.name: weight.size for weight in group} for group in groups]
        self._lengths = [part_length(sum(group.values()), self.ranks, alignment) for group in sizes]
        """Number of elements in a rank's slice of each group, with padding."""
        shards = [split_group(group, self.ranks, alignment) for group in sizes]
        self._shards: list[Shard] = [by_rank[rank] for by_rank in shards]
        """This rank's slice of each group."""
        self._slices = {part.name: part.size for shard in self._shards for part in shard}
        """Number of elements that this rank updates, by parameter."""
        self._owners: dict[str, list[tuple[int, int]]] = {}
        """The ranks that update each parameter, by its name, with the number of elements that each rank updates."""
        for by_rank in shards:
            for owner, shard in enumerate(by_rank):
                for part in shard:
                    self._owners.setdefault(part.name, []).append((owner, part.size))
        touched = sum(weight.size for weight in self.weights if weight.name in self._slices)
        self._num_touched_bytes = touched * self.parameter_number_bytes
        lengths = zip(self._shards, self._lengths, strict=True)
        self._num_padding = sum(length - sum(part.size for part in shard) for shard, length in lengths)
        self._sum: Storage | None = None
        self._new: Storage | None = None
        self._buffer: Storage | None = None

    def add_resident(self) -> None:
        """Adds the frozen weights, the flat groups, this rank's slices for the update, and the offloading buffers."""
        self.add_frozen()
        largest = max(weight.size for weight in self.weights)
        for length in self._lengths:
            self.keep("parameter_bytes", "flat", length * self.ranks * self.parameter_number_bytes)
            self._keep_state("master_bytes", "flat", length * self.updated_number_bytes)
            if self._settings.offload_optimizer:
                self.offload("gradient_bytes", "flat", length * self.updated_number_bytes)
                if self._on_cpu:
                    self.hold("bucket_bytes", length * self.parameter_number_bytes)
        if self._settings.offload_optimizer:
            self.hold("bucket_bytes", (2 if self._on_cpu else 1) * largest * self.parameter_number_bytes)
            if self._accumulates:
                self.offload("gradient_bytes", "earlier micro-batches", self._num_touched_bytes)

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """At stage 2, adds the gradient to the bucket. At stage 1, keeps it until the end of backward.

        With `overlap_comm`, stage 1 also adds the last micro-batch's gradients to the bucket as they become ready.
        """
        if self._buffer is None:
            num_buckets = 2 if self._settings.overlap_comm else 1
            self._buffer = self.make("bucket_bytes", num_buckets * self._limit * self.parameter_number_bytes)
        super().on_gradient(weight, gradient)
        if self._settings.stage == 2 or (self._settings.overlap_comm and self.is_last):
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
            flat = self.flatten(sizes, self.parameter_number_bytes)
            self.send("all_reduce", sum(sizes) * self.parameter_number_bytes)
            del flat
        for weight in self._bucket:
            if weight.name in self._slices:
                self._take(self._slices[weight.name])
            self.whole.pop(weight.name, None)
        self._bucket.clear()

    def _take(self, size: int) -> None:
        """Copies this rank's part of a summed gradient.

        Args:
            size: number of elements of the gradient that this rank updates.
        """
        if not self._settings.offload_optimizer:
            self._new = self._new or self.make("gradient_bytes", self._num_touched_bytes)
        elif self.is_last:
            self.make("bucket_bytes", size * _DOUBLE)
            self.make("bucket_bytes", size * self.updated_number_bytes if self._is_cast else 0)

    def end_backward(self) -> None:
        """Sums the remaining gradients over the ranks, then frees the buckets."""
        if self._settings.stage == 1 and not self.is_last:
            return
        if self._settings.stage == 1 and not self._settings.overlap_comm:
            for group in self._groups:
                for weight in group:
                    self._add(weight)
        self._reduce()
        self._buffer = None
        self._sum = self._sum or self._new
        self._new = None
        if self.is_last and not self._settings.offload_optimizer:
            self.hold("padding", self._num_padding * self.parameter_number_bytes)

    def gradients(self) -> Counter[str]:
        """Returns the bytes of this rank's gradient copies and their padding. Empty if the optimizer is offloaded."""
        if self._settings.offload_optimizer:
            return Counter()
        touched = self._num_touched_bytes if self._slices else 0
        return Counter({"touched": touched, "padding": self._num_padding * self.parameter_number_bytes})

    def update(self) -> None:
        """Sums the norms over the ranks, updates each group, and gathers the updated parameters."""
        super().update()
        for _ in self._groups:
            self.send("all_reduce", 4)
        if self._is_cast:
            self.send("all_reduce", 1)  # whether any gradient is not finite
        if not self._settings.offload_optimizer:
            self.make("bucket_bytes", max(self._slices.values(), default=0) * _DOUBLE)
            for shard, length in zip(self._shards, self._lengths, strict=True):
                is_padded = sum(part.size for part in shard) < length
                self._copy_gradients(len(shard) + is_padded, length)
        self._sum = None
        self.drop("padding")
        if self.ranks > 1:
            for length in self._lengths:
                self.gather(length * self.ranks * self.parameter_number_bytes)

    def updated(self) -> list[Weight]:
        """Returns this rank's slice of each group, as one flat tensor with padding."""
        dtype = self.formats.master or self.formats.parameters
        return [Weight(f"group {i}", (length,), dtype, "flat") for i, length in enumerate(self._lengths)]


class GatheredLaw(ZeroLaw):
    """Stage 3: each rank keeps a part of every parameter. DeepSpeed's coordinator gathers whole parameters for use.

    The coordinator knows the order of uses from the previous step. At each use it also gathers the next parameters, all
    in one buffer. After a use it frees the parameter, unless the parameter is used again soon.
    """

    replaces_linear = True  # deepspeed/runtime/zero/linear.py replaces it until the engine is closed

    def __init__(
        self, weights: list[Weight], groups: list[list[Weight]], work: Workload, settings: ZeroSettings, rank: int
    ):
        super().__init__(weights, groups, work, settings, rank)
        sizes = {weight.name: weight.size for weight in self.every}
        self._parts = {name: part_length(size, self.ranks) for name, size in sizes.items()}
        self._sizes = sizes
        self._stays = {name for name, size in sizes.items() if size <= settings.persistence_threshold}
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
        """Derives the order in which the coordinator sees modules in forward and backward."""
        self._trace = list(_modules(uses))

    def _padded(self, name: str) -> int:
        return self._parts[name] * self.ranks * self.parameter_number_bytes

    def add_resident(self) -> None:
        """Adds this rank's parts of parameters, master copies and gradients, persistent parameters, and the bucket."""
        for weight in self.every:
            if weight.name in self._stays:
                self.hold("gathered_bytes", weight.num_bytes)
            if not weight.is_trained:
                self._keep_parameters(
                    "frozen_bytes", weight.part, self._parts[weight.name] * self.parameter_number_bytes
                )
        for weight in self.weights:
            length = self._parts[weight.name]
            self._keep_parameters("parameter_bytes", weight.part, length * self.parameter_number_bytes)
            self._keep_state("master_bytes", weight.part, length * self.updated_number_bytes)
            self._keep_state("gradient_bytes", weight.part, length * self.parameter_number_bytes)
            if self._settings.offload_optimizer:
                self.offload("gradient_bytes", weight.part, length * self.updated_number_bytes)
        self.hold("bucket_bytes", self._limit * self.parameter_number_bytes)

    def begin_micro_batch(self, is_last: bool) -> None:
        """Restarts the order of uses."""
        super().begin_micro_batch(is_last)
        self._begin_pass()

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """Frees the previous parameter if it is not needed soon, fetches this one, and gathers the next ones ahead."""
        if not self._is_ahead:
            self._enter()
        self._is_ahead = False

    def _enter(self) -> None:
        """Enters the next module that has a weight. First enters any enclosing modules that begin with it."""
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
                num_bytes = self._sizes[other] * self.parameter_number_bytes if self.ranks > 1 else 0
                self._whole[other] = self.make("gathered_bytes", num_bytes)
            names.clear()  # all of them are copied out now, but the buffer lives until the last of them is used
            del buffer
        if self._fetched_until[name] <= at and self._queue:
            self._fetched_until[name] = self._queue.popleft()[0] + 1
        self._look_ahead()
        self._num_uses += 1

    def _look_ahead(self) -> None:
        most = min(self._settings.max_live_parameters - self._num_there, self._settings.prefetch_bucket_size)
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
            return self.make("gathered_bytes", 0)  # with one rank, its part is the parameter itself
        num_bytes = sum(map(self._padded, names))
        buffer = self.make("gathered_bytes", num_bytes)
        self.gather(num_bytes)
        return buffer

    def _release(self) -> None:
        """Frees the parameter that was used last, unless it is used again within `max_reuse_distance` elements."""
        name, self._current = self._current, None
        if name is None or name in self._stays or self._fetched_until[name] > self._num_uses + 1:
            return
        distance = 0
        for later in self._trace[self._num_uses :]:
            if distance >= self._settings.max_reuse_distance:
                break
            if later == name:
                return
            distance += self._sizes.get(later, 0)
        self._whole.pop(name, None)
        self._num_there -= self._sizes[name]

    def end_forward(self) -> None:
        """Leaves the last module of forward and enters the first one of backward, before the loss runs backward."""
        self._enter()
        self._is_ahead = True

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Adds the gradient to the bucket. If the bucket has no room for it, the bucket is summed first."""
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
        is_padded = num_bytes != self._num_in_bucket * self.parameter_number_bytes
        flat = self.make("bucket_bytes", num_bytes) if is_padded or len(self._bucket) > 1 else None
        self.scatter(num_bytes)
        del flat
        for weight in self._bucket:
            self.whole.pop(weight.name, None)
        self._bucket.clear()

    def end_backward(self) -> None:
        """Sums the remaining gradients, then frees all parameters.

        DeepSpeed does not see the end of the first module's backward, because no gradient leaves that module.
        """
        self._reduce()
        self._begin_pass()

    def update(self) -> None:
        """Sums the norms over the ranks, updates each group, and gathers the persistent parameters again."""
        super().update()
        offloads = self._settings.offload_optimizer
        for _ in self._groups:
            self.send("all_reduce", 4 if offloads else _DOUBLE)
        if not offloads:
            self.make("bucket_bytes", max(self._parts[weight.name] for weight in self.weights) * _DOUBLE)
            for group in self._groups:
                self._copy_gradients(len(group), sum(self._parts[weight.name] for weight in group))
        if self._stays:
            self.gather(sum(map(self._padded, self._stays)))

    def updated(self) -> list[Weight]:
        """Returns this rank's parts of the parameters, joined into one flat tensor per group."""
        dtype = self.formats.master or self.formats.parameters
        lengths = [sum(self._parts[weight.name] for weight in group) for group in self._groups]
        return [Weight(f"group {i}", (length,), dtype, "flat") for i, length in enumerate(lengths)]


_AROUND = ""
"""Placeholder in the order of modules for a module that has no weights of its own."""


def _modules(uses: list[tuple[str, bool]]) -> Iterator[str]:
    """Yields the weights' names in order of use. Before each name, yields `_AROUND` once per enclosing module entered.

    Args:
        uses: for each use, the weight's name and whether the use is in backward.
    """
    inside: list[str] = []
    was_backward = False
    for name, in_backward in uses:
        names = name.split(".")[:-2]  # names of the modules that enclose the weight's module
        around = ["", *(".".join(names[: i + 1]) for i in range(len(names)) if not _is_list(names, i))]
        if in_backward != was_backward:
            inside = []
        yield from (_AROUND for module in around if module not in inside)
        yield name
        inside, was_backward = around, in_backward


def _is_list(names: list[str], at: int) -> bool:
    return at + 1 < len(names) and names[at + 1].isdigit()
