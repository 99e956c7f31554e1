"""What a run will cost, asked of each of its parts before it begins."""

from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmeff.core import group
from llmeff.core.config import ConfigError
from llmeff.core.layout import Layout
from llmeff.core.table import Role
from llmeff.core.tensors import empty_on
from llmeff.core.units import show_bytes, show_quantity
from llmeff.cost.arrays import Weight
from llmeff.cost.keeping import Keeping
from llmeff.cost.price import KINDS, Kind, Price
from llmeff.cost.step import price_state
from llmeff.cost.workload import Workload
from llmeff.models import ModelConfig
from llmeff.optim import OptimizerConfig
from llmeff.parallel import Single, StrategyConfig
from llmeff.record.meters import PeakLiveBytes, count_flops, saved_bytes
from llmeff.runconfig import RunConfig

USABLE = 0.8
"""How much of the free memory a micro-batch of `auto` size may take; the rest is for kernels' own buffers,
fragmentation, evaluation and whatever else runs."""


def predict(config: RunConfig, rank: int = 0) -> Price:
    """The price of one optimizer step of a run on one rank.

    Args:
        config: its vocabulary resolved; a micro-batch that is still `auto` counts as the whole batch.
        rank: which one: shares may differ by padding, and by which parameters are whole in them.

    Raises:
        ConfigError: the vocabulary is still `auto`.
    """
    share = config.train.batch // config.parallel.ranks
    micro_batch = share if config.train.micro_batch == "auto" else config.train.micro_batch
    return _price(config, micro_batch, rank)


def _price(config: RunConfig, micro_batch: int, rank: int) -> Price:
    return price_step(config.model, config.optim, workload(config, micro_batch), config.parallel, rank)


def workload(config: RunConfig, micro_batch: int) -> Workload:
    """What a step of the run does on one rank, in micro-batches of so many sequences.

    Raises:
        ConfigError: the vocabulary is still `auto`.
    """
    if getattr(config.model, "vocab_size", None) == "auto":
        raise ConfigError("model.vocab_size is auto: only a tokenizer tells it; give a number to plan without data")
    one: Workload = config.task.workload(config.model, config.data)
    return replace(
        one,
        num_sequences=micro_batch,
        num_micro_batches=config.train.batch // config.parallel.ranks // micro_batch,
        precision_name=config.precision,
        recompute=config.runtime.recompute,
        on_cpu=config.runtime.device == "cpu" or not torch.cuda.is_available(),
    )


_ALONE = Single()


def price_step(
    model: ModelConfig, optim: OptimizerConfig, work: Workload, parallel: StrategyConfig = _ALONE, rank: int = 0
) -> Price:
    """The price of a model's and an optimizer's step on a rank: by their laws, or traced where the model has none."""
    try:
        weights = model.weights()
    except NotImplementedError:
        with torch.device("meta"):
            module = model.build()
        return trace(module, optim, work, parallel, rank)
    keeping = parallel.keeping(weights, optim.groups(model.roles()), work, rank)
    return model.price(work, keeping) + _state(optim, work, keeping)


def _state(optim: OptimizerConfig, work: Workload, keeping: Keeping) -> Price:
    """The optimizer's; it fills no memory of a GPU where it is updated on the CPU."""
    price = optim.price(keeping.updated(), work.precision)
    return price.only(["optimizer_bytes"]) if keeping.updates_on_host and not work.on_cpu else price


def resolve_micro_batch(config: RunConfig) -> int:
    """`train.micro_batch` as a number, the same on all ranks; on CPUs they are taken to share one machine's memory.

    Raises:
        ConfigError: it is auto, and not even one sequence fits.
    """
    if config.train.micro_batch != "auto":
        return config.train.micro_batch
    if config.runtime.device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
    else:
        free_bytes = psutil.virtual_memory().available // config.parallel.ranks
    return fit_micro_batch(config, int(USABLE * group.least(free_bytes)))


def fit_micro_batch(config: RunConfig, budget_bytes: int) -> int:
    """The largest divisor of a rank's batch whose predicted peak is within the budget.

    Raises:
        ConfigError: not even one sequence is.
    """
    ranks = config.parallel.ranks
    share = config.train.batch // ranks
    some = {0, ranks // 2, ranks - 1}  # they differ by little
    peak_bytes = 0
    for micro_batch in (n for n in range(share, 0, -1) if share % n == 0):
        peak_bytes = max(_price(config, micro_batch, rank).total("peak_bytes") for rank in some)
        if peak_bytes <= budget_bytes:
            return micro_batch
    raise ConfigError(
        f"train.micro_batch: one sequence at a time would take {show_bytes(peak_bytes)}, and {show_bytes(budget_bytes)} "
        "may be used: shorten data.sequence_length, set runtime.recompute = true, or choose a smaller model"
    )


def show(price: Price) -> str:
    """The price as a table of totals, each with its largest parts."""
    lines = []
    for kind in KINDS:
        parts = sorted(price.parts(kind).items(), key=lambda part: -part[1])
        if parts:
            total = show_quantity(kind, price.total(kind))
            named = ", ".join(f"{part} {show_quantity(kind, count)}" for part, count in parts[:4])
            lines.append(f"{kind:<16} {total:>14}   {named}")
    if price.source == "traced":
        lines.append("traced: counted in a run of the model on shapes, since it states no law")
    return "\n".join(lines)


_SHARED: tuple[Kind, ...] = (
    "parameters",
    "parameter_bytes",
    "master_bytes",
    "gradient_bytes",
    "gathered_bytes",
    "bucket_bytes",
    "wire_bytes",
)


def trace(
    module: nn.Module, optim: OptimizerConfig, work: Workload, parallel: StrategyConfig = _ALONE, rank: int = 0
) -> Price:
    """Counts a module's step by running it on tensors without numbers, which takes no memory.

    Args:
        module: with the forward of `Decoder`; on any device, "meta" included. It is moved.
        optim: whose state the step finds.
        work: what the step does.
        parallel: how the state is shared out: its price is the law's, and the peak is that of one process, more or less
            by what it takes elsewhere.
        rank: which share.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty_on(module, "cpu")
        module.recompute = work.recompute  # type: ignore[assignment]  # a plain flag of every model

        def forward(batch: dict[str, Any]) -> Tensor:
            with torch.autocast("cpu", getattr(torch, work.precision.compute), enabled=work.precision.autocast):
                loss: Tensor = module(**batch)
            return loss

        def run() -> None:
            forward(_batch(work)).backward()

        flops = count_flops(run)
        module.recompute = False  # type: ignore[assignment]
        with _Attention() as attention:  # type: ignore[no-untyped-call]
            model_flops = count_flops(run) - attention.surplus_flops
        module.recompute = work.recompute  # type: ignore[assignment]
        module.zero_grad(set_to_none=True)
        batch = _batch(work)
        given = [value for value in batch.values() if isinstance(value, Tensor)]
        saved = saved_bytes(lambda: forward(batch), [*module.parameters(), *module.buffers(), *given])
        with PeakLiveBytes(module.parameters(), held=module.buffers()) as live:
            for _ in range(min(work.num_micro_batches, 2)):
                run()
    weights = [
        Weight(name, tuple(parameter.shape), work.precision.parameters, "model")
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    roles: dict[str, Role] = module.roles()  # type: ignore[operator]  # a method of every language model
    groups = optim.groups({weight.name: roles[weight.name] for weight in weights})
    keeping = parallel.keeping(weights, groups, work, rank)
    state = price_state(weights, work, keeping)
    alone = price_state(weights, work, _ALONE.keeping(weights, groups, work, rank=0))
    entries: dict[tuple[Kind, str], int] = {
        ("executed_flops", "model"): flops * work.num_micro_batches,
        ("model_flops", "model"): model_flops * work.num_micro_batches,
        ("saved_bytes", "model"): saved,
        ("peak_bytes", "model"): live.peak.total + state.total("peak_bytes") - alone.total("peak_bytes"),
    }
    shared = state.only(_SHARED) + _state(optim, work, keeping)
    return Price(entries, "traced") + shared


def _batch(work: Workload) -> dict[str, Any]:
    tokens = torch.zeros(work.num_sequences, work.num_tokens, dtype=torch.int64)
    layout = None
    if work.packed:
        layout = Layout(positions=torch.zeros_like(tokens), documents=torch.zeros_like(tokens))
    return {
        "tokens": tokens,
        "layout": layout,
        "targets": torch.zeros_like(tokens),
        "loss_chunk": work.loss_chunk,
    }


class _Attention(TorchDispatchMode):
    """Adds up what attention's kernel computes beyond what the model asks for."""

    surplus_flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            query, num_keys = args[0], args[1].shape[2]
            causal_pairs = query.shape[2] + 1  # twice the mean over queries
            # a pass of each kind: 4 and 10 for every pair in the kernels, 4 and 8 for a causal pair in the model
            self.surplus_flops += query.numel() * (14 * num_keys - 6 * causal_pairs)
        return func(*args, **(kwargs or {}))
