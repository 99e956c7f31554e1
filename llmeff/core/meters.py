"""What a step really takes: bytes live at once, bytes kept for backward, FLOPs executed, energy drawn."""

import contextlib
import math
import resource
import sys
import time
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llmeff.core import group, kernels
from llmeff.core.dist import silence_profiler
from llmeff.core.log import logger

Kind = Literal["parameters", "gradients", "optimizer", "other"]
"""Kinds of live bytes; `other` is activations, batches and temporaries."""


def peak_allocated_bytes(device: torch.device) -> int | None:
    """The most bytes that CUDA's allocator held at once since `peak_bytes` last reset the count; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def resident_bytes() -> int:
    """Bytes of the machine's memory that the process holds now, with libraries and freed memory not yet returned."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # not Linux
        return peak_resident_bytes()


def bytes_now(device: torch.device) -> int:
    """Memory in use now, in bytes: by CUDA's allocator on a GPU, by the whole process on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def peak_resident_bytes() -> int:
    """The most bytes of the machine's memory that the process has held since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True, kw_only=True)
class LiveBytes:
    """Bytes of tensors that were live at the same time."""

    total: int
    """All kinds together."""
    by_kind: dict[Kind, int]
    """By kind, at the moment when the total was highest."""


class _Watch(TorchDispatchMode):
    """Hands every tensor that an operation returns to `see`."""

    see: Callable[[Tensor], None]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result


class PeakLiveBytes:
    """Meters the bytes of live tensors while it is entered; afterwards `peak` describes the moment of the highest total.

    Each storage counts once, whole, from the operation that returns it until it is freed. It does not see what a kernel
    allocates and frees inside itself, nor a storage that is resized in place. A step takes about twice as long under it,
    and compiled code runs eagerly: meter one step, and time others.

    Args:
        parameters: live from the start, as are the gradients that they hold.
        optimizer: its state counts as a kind of its own, even if the metered step creates it.
        held: more tensors that are live from the start: buffers, the batch.
    """

    peak: LiveBytes

    def __init__(
        self,
        parameters: Iterable[Tensor],
        optimizer: Optimizer | None = None,
        held: Iterable[Tensor] = (),
    ):
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._held = list(held)
        self._live: dict[int, tuple[int, weakref.finalize[Any, Any]]] = {}
        self._kinds: dict[int, Kind] = {}
        self._events: list[tuple[int, int]] = []
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> "PeakLiveBytes":
        for parameter in self._parameters:
            self._see(parameter, "parameters")
            self._see_gradient(parameter)
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._see_gradient)
                self._entered.callback(hook.remove)
        self._see_state()
        for tensor in self._held:
            self._see(tensor)
        watch = _Watch()  # type: ignore[no-untyped-call]
        watch.see = self._see
        self._entered.enter_context(watch)
        return self

    def __exit__(self, *details: object) -> None:
        self._entered.close()
        self._see_state()
        for _, finalizer in self._live.values():
            finalizer.detach()
        self.peak = self._replay()

    def _see(self, tensor: Tensor, kind: Kind | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            # The serial number tells apart storages that have the same address one after the other.
            self._live[key] = len(self._events), weakref.finalize(storage, self._free, key, size)
            self._events.append((self._live[key][0], size))
        if kind is not None:
            self._kinds[self._live[key][0]] = kind

    def _free(self, key: int, size: int) -> None:
        serial, _ = self._live.pop(key)
        self._events.append((serial, -size))

    def _see_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._see(parameter.grad, "gradients")

    def _see_state(self) -> None:
        if self._optimizer is not None:
            for leaf in tree_leaves(dict(self._optimizer.state)):
                if isinstance(leaf, Tensor):
                    self._see(leaf, "optimizer")

    def _replay(self) -> LiveBytes:
        # At the end, since it may show only later what a storage is (a gradient, a moment).
        live: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        total, best = 0, LiveBytes(total=0, by_kind=dict(live))
        for serial, size in self._events:
            live[self._kinds.get(serial, "other")] += size
            total += size
            if total > best.total:
                best = LiveBytes(total=total, by_kind=dict(live))
        return best


_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
}
_NO_PAYLOAD = {"barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd"}


class WireMeter(TorchDispatchMode):
    """Counts the bytes that the ranks send one another while it is entered, as this rank sees it.

    Each collective counts with its full payload, the larger of what it reads and writes: for a gather or a scatter the
    whole, of which a rank has a part. How much of it a backend moves depends on its algorithm. Compiled code runs
    eagerly meanwhile.
    """

    num_bytes: Counter[str]
    """Bytes by collective: all_reduce, all_gather, reduce_scatter, broadcast, reduce."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls collectives of its own, which come here again
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in _NO_PAYLOAD:
            payloads = [
                sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor)) for value in (*args, result)
            ]
            self.num_bytes[_COLLECTIVES.get(name, name)] += max(payloads)
        return result


_SETTLED_S = 0.002
"""Seconds after which gloo's thread has usually released a collective's tensors; nothing tells when."""


class _Settled(TorchDispatchMode):
    """Waits after each collective until gloo's thread has released its tensors: a profiler does not see that thread."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            works: list[Any] = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.ScriptObject)]
            for work in works:
                work.wait()
            time.sleep(_SETTLED_S)
        return result


def peak_bytes(run: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes live at once during a call, by the allocator's own account.

    On a GPU the allocator keeps its peak. On a CPU it tells the profiler of every allocation, but does not know what was
    live before the call: pass that as `held`. Only the speed of a call on a CPU changes. With one process, compiled code
    stays compiled. With more, each collective is waited for, since the profiler does not see what gloo's own thread frees.
    What is still not seen to be freed counts as freed at the end of its collective.

    Args:
        run: the call.
        held: the tensors that are live before it.
        device: the device that it runs on.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    silence_profiler()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    settled = _Settled() if group.is_shared() else contextlib.nullcontext()  # type: ignore[no-untyped-call]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, settled:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    results = profiler.profiler.kineto_results
    if group.is_shared():
        changes = _with_unseen(results.experimental_event_tree())
    else:
        changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return sum(storages.values()) + max(accumulate(changes), default=0)


def _with_unseen(roots: list[Any]) -> list[int]:
    """Bytes allocated (above zero) and freed (below), in order. What gloo's thread freed goes when the next collective ends."""
    events = list(_flattened(roots))
    ends = sorted(event.end_time_ns for event in events if event.name.startswith("c10d::"))
    changes: list[tuple[int, int]] = []
    there: dict[int, tuple[int, int]] = {}

    def go_unseen(start_ns: int, num_bytes: int) -> None:
        after = bisect_right(ends, start_ns)
        if after < len(ends):
            changes.append((ends[after], -num_bytes))

    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag != _EventType.Allocation:
            continue
        place, change = event.extra_fields.ptr, (event.start_time_ns, event.extra_fields.alloc_size)
        before = there.pop(place, None)
        if change[1] > 0:
            there[place] = change
            if before is not None:  # something else has its address by now
                go_unseen(*before)
        changes.append(change)
    for left in there.values():
        go_unseen(*left)
    return [num_bytes for _, num_bytes in sorted(changes, key=lambda change: change[0])]


def _flattened(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flattened(event.children)


_FIRST_METERED = 3
"""By this step, strategies have built all that they build as they run."""


def metered_steps(num_steps: int, interval: int) -> tuple[int, int]:
    """The step whose operations and traffic are counted, and the later one whose memory is metered.

    Neither comes right after an evaluation, unless every step does: strategies may then still hold what other steps gather
    again.

    Args:
        num_steps: steps in the run.
        interval: steps between its evaluations; 0: none before the end.
    """
    steps = range(_FIRST_METERED, num_steps + 1)
    quiet = [step for step in steps if interval == 0 or (step - 1) % interval][:2]
    counted, metered = quiet if len(quiet) == 2 else (_FIRST_METERED, _FIRST_METERED + 1)
    return counted, metered


def saved_bytes(run: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward during a call: a forward pass with its loss.

    Each storage counts once, whole, however many operations keep it or views of it. Parameters do not count, not even
    gathered ones.

    Args:
        run: the call.
        excluded: tensors that are live anyway: buffers, the batch.
    """
    known = {tensor.untyped_storage()._cdata for tensor in excluded}
    # Held, not only counted: if a storage were freed meanwhile, the next could take its address.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        base = tensor._base if tensor._is_view() else tensor
        if storage._cdata not in known and not isinstance(base, nn.Parameter):
            saved[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


_Shape = tuple[int, ...]


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values: 2 products of 2 B N T S H. Masked pairs are computed too."""
    B, N, T, H = query
    return 2 * B * N * T * key[2] * (H + value[3])


def _attention_backward_flops(grad_out: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """The scores again, and one product for each gradient: of scores, query, key and value."""
    B, N, T, H = query
    return 2 * B * N * T * key[2] * (3 * H + 2 * value[3])


def _convolution_backward_flops(
    grad_out: _Shape, x: _Shape, weight: _Shape, *rest: Any, output_mask: Any = None, **__: Any
) -> int:
    """As much as forward for each gradient asked for; torch's own formula ignores that channels are in groups."""
    transposed, mask = rest[4], rest[7] if output_mask is None else output_mask
    sites = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * sites * math.prod(weight) * (bool(mask[0]) + bool(mask[1]))


def _solve_flops(matrix: _Shape, right: _Shape, *_: Any, left: bool = True, **__: Any) -> int:
    """Half a product with a whole matrix: one multiply-add for each number of a triangle and each column."""
    return math.prod(right) * matrix[-1]


# torch has no formulas for its CPU kernel of scaled dot product attention and for triangular systems: it would count nothing.
_FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.aten.linalg_solve_triangular: _solve_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs that a call executes. A multiply-add is 2, recomputation counts, and causal attention counts in full.

    Convolutions, matrix products and attention count. Elementwise work, norms, embeddings, matrix-vector products and
    custom operations without a formula do not. Compiled code runs eagerly meanwhile. Attention kernels are noted.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    for operation in counter.get_flop_counts().get("Global", {}):
        name = str(operation).rpartition(".")[2].lstrip("_")
        if "attention" in name and "backward" not in name:
            kernels.ran(f"{kernels.SDPA}, {name}")
    return int(counter.get_total_flops())


def count_step(run: Callable[[], object]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Counts what a step does.

    Returns:
        `executed_flops` if the FLOPs of all kernels can be counted, and `wire_bytes` if ranks sent any; and which kernels
        ran, for operations that have several.
    """
    with WireMeter() as wire, kernels.noted() as ran:
        flops = count_flops(run)
    counted = {"executed_flops": float(flops)} if all(ran.values()) else {}
    sent = {"wire_bytes": float(wire.num_bytes.total())} if wire.num_bytes else {}
    is_fused = any(kernel.startswith(f"{kernels.SDPA}, ") for kernel in ran)
    return counted | sent, tuple(sorted(kernel for kernel in ran if kernel != kernels.SDPA or not is_fused))


class EnergyMeter:
    """The energy that GPUs have drawn, from NVML's counter (Volta and newer).

    Args:
        device: this rank's.
        before_j: joules that all ranks' GPUs drew for the run before this was made; None: unknown.
    """

    def __init__(self, device: torch.device, before_j: float | None = 0.0):
        self._read = _energy_counter(device) if device.type == "cuda" else None
        self._start_j = self._read() if self._read is not None else 0.0
        self._before_j = before_j

    def energy_j(self) -> float | None:
        """Joules that this rank's whole GPU drew since this was made, whoever used it; None if nothing counts them."""
        return None if self._read is None else self._read() - self._start_j

    def total_j(self) -> float | None:
        """Joules of all ranks' GPUs since the run began, before a resume too; None if a part is unknown. All ranks must call it."""
        known = [math.nan if part is None else part for part in (self.energy_j(), self._before_j)]
        total = float(group.total(torch.tensor(known[0], dtype=torch.float64))) + known[1]
        return None if math.isnan(total) else total


def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml
    except ImportError:
        logger.info('energy is not measured: to measure it, run pip install "llmeff[gpu]"')
        return None
    try:
        pynvml.nvmlInit()
        # By UUID: NVML numbers all devices of the machine, torch only those visible to it.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        logger.info("energy is not measured: %s", error)
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
