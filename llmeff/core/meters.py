"""Measures the real cost of a step: peak live bytes, bytes saved for backward, executed FLOPs, wire bytes, energy."""

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
"""Kinds of live bytes. `other` covers activations, batches and temporaries."""


def peak_allocated_bytes(device: torch.device) -> int | None:
    """Returns CUDA's peak allocated bytes since `peak_bytes` last reset the count, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def resident_bytes() -> int:
    """Returns the process's resident memory in bytes, or its peak if not on Linux.

    This includes libraries, and freed memory that was not yet returned to the system.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # not Linux
        return peak_resident_bytes()


def bytes_now(device: torch.device) -> int:
    """Returns the bytes in use now: on a GPU those allocated by CUDA, on a CPU the resident memory of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def peak_resident_bytes() -> int:
    """Returns the process's peak resident memory in bytes since it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True, kw_only=True)
class LiveBytes:
    """Peak bytes of live tensors."""

    total: int
    """The highest total of all kinds."""
    by_kind: dict[Kind, int]
    """Bytes of each kind at the moment when the total was highest."""


class _Watch(TorchDispatchMode):
    """Calls `see` with every tensor that an operation returns."""

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
    """Context manager that meters the peak bytes of live tensors. Read the result from `peak` after the block.

    Each storage counts once, with its full size, from the operation that returns it until it is freed. The meter misses
    memory that a kernel allocates and frees internally, and storages that are resized in place. It makes a step about
    twice as slow and runs compiled code eagerly, so do not time a metered step.

    Args:
        parameters: the parameters. They and the gradients that they already have are live from the start.
        optimizer: its state counts as the kind `optimizer`, even if the metered step creates that state.
        held: other tensors that are live from the start, such as buffers and the batch.
    """

    peak: LiveBytes
    """Live bytes at the moment of the highest total. Set when the block ends."""

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
            # The serial number distinguishes storages that have the same address at different times.
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
        # Events are replayed at the end, because a storage's kind (gradient, optimizer) may be known only later.
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
    """Context manager that counts the payload bytes of all collectives that this rank takes part in.

    The payload of a collective is its input or its output, whichever is larger. For an all-gather or a reduce-scatter
    this is the full tensor, not this rank's part. How many bytes a backend moves for it depends on the backend's
    algorithm. Compiled code runs eagerly inside the block.
    """

    num_bytes: Counter[str]
    """Payload bytes of each collective: all_reduce, all_gather, reduce_scatter, broadcast, reduce."""

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
            return NotImplemented  # DTensor then calls collectives on plain tensors, which are counted here
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in _NO_PAYLOAD:
            payloads = [
                sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor)) for value in (*args, result)
            ]
            self.num_bytes[_COLLECTIVES.get(name, name)] += max(payloads)
        return result


_SETTLED_S = 0.002
"""Seconds after which gloo's thread has usually released a collective's tensors. Gloo does not report when it has."""


class _Settled(TorchDispatchMode):
    """Waits after each collective until gloo's thread should have released its tensors.

    The profiler does not see what that thread frees.
    """

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
    """Returns the peak bytes live during a call, as the device's allocator reports them.

    On a GPU, this is the peak of CUDA's allocator. On a CPU, torch's profiler records every allocation and free during
    the call, and the bytes of `held` are added. The profiler slows the call but does not change its results.

    With one process, compiled code stays compiled. With several, the call waits after each collective, because the
    profiler does not see what gloo's thread frees. If the profiler still misses a free, the memory counts as freed at
    the end of the first collective that ends after the allocation.

    Args:
        run: the call to measure.
        held: the tensors that are live before the call. Only used on a CPU.
        device: the device that the call runs on.
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
    """Returns the changes of allocated bytes in order of time: positive for an allocation, negative for a free.

    Frees by gloo's thread are not recorded. Such memory counts as freed at the end of the first collective that ends
    after the allocation.
    """
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
            if before is not None:  # its address was reused, so it was freed unseen
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
"""First step that may be metered. By then, strategies have allocated all the buffers that they create lazily."""


def metered_steps(num_steps: int, interval: int) -> tuple[int, int]:
    """Returns two step numbers: one to count FLOPs and wire bytes in, and a later one to meter memory in.

    Neither step directly follows an evaluation, because parameters that a strategy gathered for the evaluation may
    still be present then. If fewer than two such steps exist from step 3 on, returns 3 and 4.

    Args:
        num_steps: number of steps in the run.
        interval: number of steps between evaluations. 0 if the only evaluation is at the end.
    """
    steps = range(_FIRST_METERED, num_steps + 1)
    quiet = [step for step in steps if interval == 0 or (step - 1) % interval][:2]
    counted, metered = quiet if len(quiet) == 2 else (_FIRST_METERED, _FIRST_METERED + 1)
    return counted, metered


def saved_bytes(run: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Returns the bytes that autograd saves for backward during a call, usually a forward pass with its loss.

    Each storage counts once, with its full size, even if several operations save it or views of it. Parameters do not
    count, nor do gathered parameters.

    Args:
        run: the call to measure.
        excluded: tensors that are live anyway and do not count, such as buffers and the batch.
    """
    known = {tensor.untyped_storage()._cdata for tensor in excluded}
    # Storages are kept alive until the end: if one were freed, a later storage could get its address.
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
    """Returns the FLOPs of the scores, and of their product with the values. Masked pairs count too."""
    B, N, T, H = query
    return 2 * B * N * T * key[2] * (H + value[3])


def _attention_backward_flops(grad_out: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of recomputing the scores and of the gradients of scores, query, key and value."""
    B, N, T, H = query
    return 2 * B * N * T * key[2] * (3 * H + 2 * value[3])


def _convolution_backward_flops(
    grad_out: _Shape, x: _Shape, weight: _Shape, *rest: Any, output_mask: Any = None, **__: Any
) -> int:
    """Returns the FLOPs of a forward pass, times the number of requested gradients (of input, weight or both).

    Torch's own formula is wrong for grouped convolutions: it ignores the groups.
    """
    transposed, mask = rest[4], rest[7] if output_mask is None else output_mask
    sites = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * sites * math.prod(weight) * (bool(mask[0]) + bool(mask[1]))


def _solve_flops(matrix: _Shape, right: _Shape, *_: Any, left: bool = True, **__: Any) -> int:
    """Returns half the FLOPs of a product with a full matrix, because only one triangle is used."""
    return math.prod(right) * matrix[-1]


# Torch has no formulas for its CPU attention kernel and for triangular solves, so it would count them as 0 FLOPs.
_FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.aten.linalg_solve_triangular: _solve_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(run: Callable[[], object]) -> int:
    """Returns the FLOPs that a call executes. Also notes (`kernels.ran`) the attention kernels that ran.

    Convolutions, matrix products and attention count, as does recomputation. A multiply-add is 2 FLOPs, and causal
    attention counts as if it had no mask. Elementwise operations, norms, embeddings, matrix-vector products and custom
    operations without a formula do not count. Compiled code runs eagerly during the call.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    for operation in counter.get_flop_counts().get("Global", {}):
        name = str(operation).rpartition(".")[2].lstrip("_")
        if "attention" in name and "backward" not in name:
            kernels.ran(f"{kernels.SDPA}, {name}")
    return int(counter.get_total_flops())


def count_step(run: Callable[[], object]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Counts a step's FLOPs and wire bytes, and notes its kernels.

    Returns:
        A dict and a tuple. The dict has `executed_flops`, if the FLOPs of all kernels can be counted, and `wire_bytes`,
        if ranks sent any. The tuple has the kernels that ran, but only for operations that can use several kernels.
    """
    with WireMeter() as wire, kernels.noted() as ran:
        flops = count_flops(run)
    counted = {"executed_flops": float(flops)} if all(ran.values()) else {}
    sent = {"wire_bytes": float(wire.num_bytes.total())} if wire.num_bytes else {}
    is_fused = any(kernel.startswith(f"{kernels.SDPA}, ") for kernel in ran)
    return counted | sent, tuple(sorted(kernel for kernel in ran if kernel != kernels.SDPA or not is_fused))


class EnergyMeter:
    """Energy used by the GPUs, from NVML's counter (Volta and newer).

    Args:
        device: this rank's device.
        before_j: joules that the GPUs of all ranks used for the run before a resume. None if unknown.
    """

    def __init__(self, device: torch.device, before_j: float | None = 0.0):
        self._read = _energy_counter(device) if device.type == "cuda" else None
        self._start_j = self._read() if self._read is not None else 0.0
        self._before_j = before_j

    def energy_j(self) -> float | None:
        """Returns the joules that this rank's GPU used since the meter was created, or None if there is no counter.

        Energy that other processes use on the same GPU counts too.
        """
        return None if self._read is None else self._read() - self._start_j

    def total_j(self) -> float | None:
        """Returns the joules that the GPUs of all ranks used since the run began, including the time before a resume.

        Returns None if any part is unknown. All ranks must call this.
        """
        known = [math.nan if part is None else part for part in (self.energy_j(), self._before_j)]
        total = float(group.total(torch.tensor(known[0], dtype=torch.float64))) + known[1]
        return None if math.isnan(total) else total


def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml
    except ImportError:
        logger.info('energy is not measured, because pynvml is not installed: run pip install "llmeff[gpu]"')
        return None
    try:
        pynvml.nvmlInit()
        # By UUID, because indices differ: NVML counts all GPUs of the machine, torch only the visible ones.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        logger.info("energy is not measured: %s", error)
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
