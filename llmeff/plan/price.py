"""Predicts the cost of a run before it begins, as the sum of the prices of its components."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmeff.config.run import RunConfig
from llmeff.core import group
from llmeff.core.config import ConfigError
from llmeff.core.cpu import instruction_set
from llmeff.core.dist import usable_cores
from llmeff.core.meters import PeakLiveBytes, count_flops, saved_bytes
from llmeff.core.parameters import Role
from llmeff.core.tensors import empty_on
from llmeff.core.units import show_bytes, show_quantity
from llmeff.cost.arrays import Weight
from llmeff.cost.price import KINDS, Kind, Price
from llmeff.cost.step import price_state
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload
from llmeff.cost.workspace import Product, Room, matrix_bytes, room

USABLE = 0.8
"""The fraction of the free memory that a step may use. The rest is for buffers of kernels, fragmentation, evaluation
and other processes."""
_FEW = 2**22
"""Largest integer tensor, in elements, whose values a trace computes.

It is enough for a micro-batch's positions, but not for every mask that is made from them."""


def predict(config: RunConfig, rank: int = 0) -> Price:
    """Returns the price of one optimizer step of a run on one rank.

    Args:
        config: the run. Its vocabulary size must be resolved. If the micro-batch is still `auto`, it counts as the
            rank's whole batch.
        rank: the rank to price. Ranks differ in padding and in the parameters that they own.

    Raises:
        ConfigError: the vocabulary is still `auto`.
    """
    share = config.train.batch // config.parallel.ranks
    micro_batch = share if config.train.micro_batch == "auto" else config.train.micro_batch
    return _price(config, micro_batch, rank)


def _price(config: RunConfig, micro_batch: int, rank: int) -> Price:
    return price_step(config, workload(config, micro_batch), rank)


def workload(config: RunConfig, micro_batch: int) -> Workload:
    """Returns the workload of a step on one rank, with `micro_batch` sequences in a micro-batch.

    Raises:
        ConfigError: the vocabulary is still `auto`.
    """
    if getattr(config.model, "vocab_size", None) == "auto":
        raise ConfigError(
            "model.vocab_size is auto, which only a tokenizer determines. Set a number to plan without data"
        )
    one: Workload = config.task.workload(config.model, config.data)
    return replace(
        one,
        num_sequences=micro_batch,
        num_micro_batches=config.train.batch // config.parallel.ranks // micro_batch,
        precision_name=config.precision,
        recompute=config.runtime.recompute,
        num_threads=num_threads(config),
        instruction_set=instruction_set(),
        on_cpu=config.runtime.device == "cpu" or not torch.cuda.is_available(),
    )


def num_threads(config: RunConfig) -> int:
    """Returns the number of CPU threads of a rank: as configured, or its share of this process's usable cores."""
    given = config.runtime.threads
    return max(1, usable_cores() // config.parallel.ranks) if given == "auto" else given


def price_step(config: RunConfig, work: Workload, rank: int = 0) -> Price:
    """Returns the price of a step on one rank.

    It is computed by laws, or traced if the model has no law or is changed by transforms.

    Args:
        config: the run, whose model, transforms, optimizer and strategy are priced.
        work: the step.
        rank: the rank to price.
    """
    weights = None
    if not config.transforms:
        with contextlib.suppress(NotImplementedError):
            weights = config.model.weights()
    if weights is None:
        return trace(config, work, rank)
    roles = config.model.roles()
    with_roles = [replace(weight, role=roles.get(weight.name)) for weight in weights]
    strategy_law = config.parallel.strategy_law(with_roles, config.optim.groups(roles), work, rank)
    return config.model.price(work, strategy_law) + _state(config, work, strategy_law)


def _state(config: RunConfig, work: Workload, strategy_law: StrategyLaw) -> Price:
    """Returns the optimizer's price. If a GPU run updates on the CPU, the price has only `optimizer_bytes`."""
    price = config.optim.price(strategy_law.updated(), work.precision)
    return price.only(["optimizer_bytes"]) if strategy_law.updates_on_host and not work.on_cpu else price


def check_model(config: RunConfig, built: nn.Module | None = None) -> None:
    """Refuses a model that does not support the run's step.

    Args:
        config: the run, with a resolved vocabulary size.
        built: the built module, or None: see `ModelConfig.problems`.

    Raises:
        ConfigError: lists everything that the step needs and the model does not support.
    """
    problems = list(config.model.problems(workload(config, 1), built))
    if problems:
        raise ConfigError(problems)


def usable_bytes(config: RunConfig) -> int | None:
    """Returns the bytes of this machine's free memory that a step of one rank may use.

    None if the machine lacks the run's device. On a CPU, all ranks are assumed to share this machine's memory.
    """
    device, has_cuda = config.runtime.device, torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        return None
    if device == "cpu" or not has_cuda:
        return int(USABLE * psutil.virtual_memory().available) // config.parallel.ranks
    return int(USABLE * torch.cuda.mem_get_info()[0])


def resolve_micro_batch(config: RunConfig) -> int:
    """Returns `train.micro_batch` as a number. If it is `auto`, the number is chosen to fit and is equal on all ranks.

    Raises:
        ConfigError: it is `auto`, and even the smallest possible micro-batch does not fit.
    """
    if config.train.micro_batch != "auto":
        return config.train.micro_batch
    return fit_micro_batch(config, group.least(usable_bytes(config) or 0))


def fit_micro_batch(config: RunConfig, budget_bytes: int) -> int:
    """Returns the largest divisor of a rank's batch whose predicted peak is within the budget.

    If batch statistics make a step depend on the micro-batch, returns the rank's whole batch. If the peak is unknown,
    its known part is compared with the budget.

    Raises:
        ConfigError: not even one sequence fits, or the whole batch must be used and does not fit.
    """
    micro_batch, price = _fit(config, budget_bytes)
    peak_bytes = price.at_least("peak_bytes")
    if peak_bytes <= budget_bytes:
        return micro_batch
    are_images = workload(config, 1).image_size is not None
    one, less = ("image", "Reduce data.size") if are_images else ("sequence", "Reduce data.sequence_length")
    many = f"one {one}" if micro_batch == 1 else f"{micro_batch} {one}s"
    if micro_batch > 1:
        less = "Reduce train.micro_batch (batch statistics are then computed over the smaller micro-batch)"
    raise ConfigError(
        f"train.micro_batch: {many} at a time would need {show_bytes(peak_bytes)}, but only {show_bytes(budget_bytes)} "
        f"may be used. {less}, set runtime.recompute = true, or choose a smaller model"
    )


def _most(config: RunConfig, micro_batch: int) -> Price:
    """Returns the price on the rank with the highest peak. Compares only a few ranks, because ranks differ little."""
    ranks = config.parallel.ranks
    prices = (_price(config, micro_batch, rank) for rank in {0, ranks // 2, ranks - 1})
    return max(prices, key=lambda price: price.at_least("peak_bytes"))


def _fit(config: RunConfig, budget_bytes: float) -> tuple[int, Price]:
    """Returns the largest micro-batch within the budget, with its price on the rank that has the highest peak.

    If no micro-batch is within the budget, returns one sequence. If batch statistics make a step depend on the
    micro-batch, returns a rank's whole batch, because training results must not depend on free memory.
    """
    share = config.train.batch // config.parallel.ranks
    least = 1 if config.model.statistics_scope() == "nothing" else share
    for micro_batch in (n for n in range(share, least - 1, -1) if share % n == 0):
        price = _most(config, micro_batch)
        if price.at_least("peak_bytes") <= budget_bytes:
            break
    return micro_batch, price


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's price, and whether its step fits in this machine's memory."""

    price: Price
    """The price of an optimizer step on one rank."""
    micro_batch: int
    """The number of sequences (or images) in a micro-batch, as priced."""
    is_auto: bool
    """Whether `train.micro_batch` was `auto`, so that the micro-batch was chosen here."""
    usable_bytes: int | None
    """Bytes that a step may use on this machine. None if the machine lacks the run's device."""

    @property
    def fits(self) -> bool | None:
        """Whether the step fits in this machine's memory.

        None if the machine lacks the run's device, or if the peak is unknown and its known part fits.
        """
        if self.usable_bytes is None:
            return None
        if self.price.at_least("peak_bytes") > self.usable_bytes:
            return False
        return None if self.price.known("peak_bytes") is None else True

    def as_dict(self) -> dict[str, Any]:
        """Returns the price as a dict, with the additional keys `micro_batch`, `usable_bytes` and `fits`."""
        machine = {"micro_batch": self.micro_batch, "usable_bytes": self.usable_bytes, "fits": self.fits}
        return self.price.as_dict() | machine


def plan(config: RunConfig) -> Plan:
    """Prices a run. The vocabulary size may still be `auto`, and the run may be meant for another machine.

    The data are opened only if the vocabulary size cannot be determined without them. If the micro-batch is `auto`, the
    largest micro-batch that fits this machine is priced, or one sequence if none fits. If this machine lacks the run's
    device, a rank's whole batch is priced.

    Raises:
        ConfigError: the model does not support the step, or the data are needed and cannot be used.
    """
    config = _resolved(config)
    check_model(config)
    usable, micro_batch = usable_bytes(config), config.train.micro_batch
    is_auto = micro_batch == "auto"
    if micro_batch == "auto":
        micro_batch, price = _fit(config, math.inf if usable is None else usable)
    else:
        price = _most(config, micro_batch)
    return Plan(price=price, micro_batch=micro_batch, is_auto=is_auto, usable_bytes=usable)


def _resolved(config: RunConfig) -> RunConfig:
    """Returns the run with a resolved model: from the config alone if it determines everything, else from the data."""
    model = config.task.infer_model(config.model, config.data)
    if model is not None:
        return config.model_copy(update={"model": model})
    try:
        task = config.task.open(config.data, config.seed, config.train.batch, is_main=True, wait=group.barrier)
    except ConfigError as error:
        if getattr(config.model, "vocab_size", None) != "auto":
            raise
        hint = "model.vocab_size is auto, which only the training text determines. Set a number to plan without data"
        raise ConfigError([*error.problems, hint]) from None
    return config.model_copy(update={"model": task.resolve(config.model)})


def show_plan(planned: Plan) -> str:
    """Returns the price as a table, followed by the priced micro-batch and whether the step fits this machine."""
    text = f"priced with train.micro_batch {planned.micro_batch}"
    if planned.usable_bytes is None:
        text += " (a rank's whole batch)" if planned.is_auto else ""
        text += ". It is unknown whether the step fits, because this machine lacks the run's device"
    elif planned.fits is None:
        text += ". It is unknown whether the step fits, because the workspace of its convolutions was not measured"
    elif planned.fits:
        text += " (auto: the largest that fits this machine now)" if planned.is_auto else ""
    else:
        text += f". The step does not fit this machine, where {show_bytes(planned.usable_bytes)} may be used now"
    return f"{show(planned.price)}\n{text}"


_UNMEASURED = (
    "the workspace of some convolutions was not measured for their kind or for this instruction set (see "
    "analysis/workspace.py)"
)


def show(price: Price) -> str:
    """Returns the price as a table of totals, each with its largest parts."""
    lines = []
    for kind in KINDS:
        parts = sorted(price.parts(kind).items(), key=lambda part: -part[1])
        if kind in price.unknown:
            least = show_quantity(kind, price.at_least(kind))
            lines.append(f"{kind:<16} {'unknown':>14}   at least {least}: {_UNMEASURED}")
        elif parts:
            total = show_quantity(kind, price.total(kind))
            named = ", ".join(f"{part} {show_quantity(kind, count)}" for part, count in parts[:4])
            lines.append(f"{kind:<16} {total:>14}   {named}")
    if price.source == "traced":
        lines.append("traced: counted by running the model on shapes, because it has no law or transforms change it")
    return "\n".join(lines)


_SHARED: tuple[Kind, ...] = (
    "parameters",
    "parameter_bytes",
    "master_bytes",
    "gradient_bytes",
    "frozen_bytes",
    "gathered_bytes",
    "bucket_bytes",
    "wire_bytes",
)


def trace(config: RunConfig, work: Workload, rank: int = 0) -> Price:
    """Prices a step by running the model on fake tensors without values, which takes almost no memory.

    Tokens and positions keep their values, because models choose operations by them. For example, transformers makes no
    mask for contiguous positions, and without a mask it does not copy the keys for grouped queries. So a packed step is
    traced with documents that end within a row. A real step in which no document ends within a row saves less
    for backward. Operations that depend on activations cannot be traced, such as the routing of experts. Besides,
    torch cannot infer the shapes of the experts' grouped products in float32.

    The strategy's share of the price comes from its law, with the weights in the order in which modules use them. The
    peak is that of one process, plus the difference that the strategy's law makes in a step without activations. The
    peak does not include parameters that recomputation gathers again.

    Args:
        config: the run. Its model is built without values and changed by its transforms. The model provides the example
            batches and the loss.
        work: the step.
        rank: the rank to price.
    """
    model = config.model
    with torch.device("meta"):
        module = model.build()
        for transform in config.transforms:
            module = transform.apply(module)
    with FakeTensorMode(allow_non_fake_inputs=True), _RealIntegers():  # type: ignore[no-untyped-call]
        empty_on(module, "cpu", getattr(torch, work.precision.parameters))
        module.recompute = work.recompute  # type: ignore[assignment]  # a plain flag of every model

        def forward(batch: dict[str, Any]) -> Tensor:
            with torch.autocast("cpu", getattr(torch, work.precision.compute), enabled=work.precision.autocast):
                return model.loss(module, batch)

        def run(batch: dict[str, Any]) -> None:
            forward(batch).backward()  # `batch` stays in memory during backward

        batch = model.example(work)
        given = [value for value in batch.values() if isinstance(value, Tensor)]
        flops = count_flops(lambda: run(batch))
        module.recompute = False  # type: ignore[assignment]
        with _Attention() as attention:  # type: ignore[no-untyped-call]
            model_flops = count_flops(lambda: run(batch)) - attention.surplus_flops
        uses = _uses(module, lambda: forward(batch))
        module.recompute = work.recompute  # type: ignore[assignment]
        module.zero_grad(set_to_none=True)
        saved = saved_bytes(lambda: forward(batch), [*module.parameters(), *module.buffers(), *given])
        with PeakLiveBytes(module.parameters(), held=module.buffers()) as live, _Rooms(work) as rooms:
            batches = [model.example(work) for _ in range(min(work.num_micro_batches, 2))]
            while batches:
                run(batches.pop(0))
    waiting = max(0, work.num_micro_batches - 2) * sum(value.nbytes for value in given)
    roles: dict[str, Role] = module.roles()  # type: ignore[operator]  # a method of every model
    weights = {
        name: Weight(
            name,
            tuple(parameter.shape),
            work.precision.parameters,
            roles[name] if roles[name] in ("embedding", "head") else "model",
            parameter.requires_grad,
            roles[name],
        )
        for name, parameter in module.named_parameters()
    }
    groups = config.optim.groups({weight.name: roles[weight.name] for weight in weights.values() if weight.is_trained})
    used = [(weights[name], comes_back) for name, comes_back in uses]
    strategy_law = config.parallel.strategy_law([*weights.values()], groups, work, rank)
    state = price_state(used, work, strategy_law)
    alone = price_state(used, work, StrategyLaw(weights.values(), work.precision))
    entries: dict[tuple[Kind, str], int] = {
        ("executed_flops", "model"): flops * work.num_micro_batches,
        ("model_flops", "model"): model_flops * work.num_micro_batches,
        ("saved_bytes", "model"): saved,
        ("workspace_bytes", "at most"): rooms.most_bytes,
        ("peak_bytes", "model"): live.peak.total + waiting + state.total("peak_bytes") - alone.total("peak_bytes"),
    }
    shared = state.only(_SHARED) + _state(config, work, strategy_law)
    unknown: frozenset[Kind] = frozenset({"workspace_bytes", "peak_bytes"} if rooms.is_unknown else ())
    return Price(entries, "traced", unknown) + shared


def _uses(module: nn.Module, forward: Callable[[], object]) -> list[tuple[str, bool]]:
    """Returns (parameter name, whether backward uses it again) in order of use. Unused parameters come last."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: list[tuple[str, bool]] = []

    def note(used: nn.Module, given: object, output: object) -> None:
        comes_back = any(tensor.requires_grad for tensor in _tensors(output))
        found.extend((names[id(parameter)], comes_back) for parameter in used.parameters(recurse=False))

    hooks = [used.register_forward_hook(note) for used in module.modules()]
    forward()
    for hook in hooks:
        hook.remove()
    seen = {name for name, _ in found}
    return found + [(n, p.requires_grad) for n, p in module.named_parameters() if n not in seen]


class _RealIntegers(TorchDispatchMode):
    """Computes the values of integer and boolean tensors that have few elements and depend only on such tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        if any(isinstance(tensor, FakeTensor) or tensor.is_meta or not _counts(tensor) for tensor in given):
            return func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            # first without values, to find out the sizes of the results
            with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
                result = func(*args, **(kwargs or {}))
                if not all(_counts(tensor) and tensor.numel() <= _FEW for tensor in _tensors(result)):
                    return result
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _counts(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


# products of batches take room by thread, of which no law speaks
_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class _Rooms(TorchDispatchMode):
    """Allocates and frees the CPU workspace of convolutions and matrix products (`cost.workspace`) as fake tensors.

    Args:
        work: the step.
    """

    is_unknown = False
    """Whether the step had a convolution whose workspace is unknown."""
    most_bytes = 0
    """Largest number of bytes that were allocated at the same time."""

    def __init__(self, work: Workload):
        super().__init__()  # type: ignore[no-untyped-call]
        self._work = work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            return self._forward(func, args)
        if func is torch.ops.aten.convolution_backward.default:
            return self._backward(func, args)
        result = func(*args, **(kwargs or {}))
        if func in _MATRIX_PRODUCTS:
            self._make(matrix_bytes(self._work, result.numel(), _format_of(result)))
        return result

    def _forward(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        result = self._enter("output", args[0], args[1], func(*args).shape, is_transposed=args[6])
        y: Tensor = func(*args)
        del result
        return y

    def _backward(self, func: Any, args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        gradient, x, weight, *_, (wants_x, *wants_own) = args
        grad_x = None
        if wants_x:
            result = self._enter("input", x, weight, gradient.shape, is_transposed=args[7])
            grad_x = func(*args[:-1], [True, False, False])[0]
            del result
        result = self._enter("weight", x, weight, gradient.shape, is_transposed=args[7])
        _, grad_weight, grad_bias = func(*args[:-1], [False, *wants_own])
        del result
        return grad_x, grad_weight, grad_bias

    def _enter(self, product: Product, x: Tensor, weight: Tensor, y: torch.Size, *, is_transposed: bool) -> Tensor:
        """Allocates the workspace of a contraction. Returns the part of it that lives until the result is made."""
        found = None if is_transposed else room(self._work, product, x.shape, weight.shape, y, _format_of(x))
        self.is_unknown |= found is None
        found = found or Room()
        result = self._make(found.result)
        self._make(found.during, beside=found.result)
        return result

    def _make(self, num_bytes: int, beside: int = 0) -> Tensor:
        """Allocates workspace, which lives as long as the result. `beside` is the number of bytes allocated already."""
        self.most_bytes = max(self.most_bytes, num_bytes + beside)
        return torch.empty(num_bytes, dtype=torch.uint8)


def _format_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


class _Attention(TorchDispatchMode):
    """Counts the FLOPs that torch's CPU attention kernel executes beyond the model FLOPs of causal attention."""

    surplus_flops = 0
    """Executed FLOPs minus model FLOPs of all attention in forward and backward."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            query, num_keys = args[0], args[1].shape[2]
            causal_pairs = query.shape[2] + 1  # twice the mean number of keys per query
            # forward and backward: 4 and 10 for every pair in the kernels, 4 and 8 for each causal pair in the model
            self.surplus_flops += query.numel() * (14 * num_keys - 6 * causal_pairs)
        return func(*args, **(kwargs or {}))
