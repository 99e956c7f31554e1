"""Computes the price of a whole optimizer step from the law of a forward pass."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from llmeff.cost.arrays import Array, Weight
from llmeff.cost.laws import Batch
from llmeff.cost.price import Kind, Price
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload

_REPEATED: tuple[Kind, ...] = ("model_flops", "executed_flops", "elementwise_ops")
_AT_PEAK = {
    "parameter_bytes": "parameters",
    "frozen_bytes": "frozen parameters",
    "master_bytes": "master copy",
    "gradient_bytes": "gradients",
    "saved_bytes": "saved activations",
    "batch_bytes": "batch",
    "gathered_bytes": "gathered parameters",
    "bucket_bytes": "buckets",
    "workspace_bytes": "workspace",
}
Law = Callable[[Tape, Any], Array]
"""A model's forward pass from a micro-batch, which a `Given` makes, to its summed loss."""
Given = Callable[[Tape], Any]
"""Makes the micro-batch that a law reads."""


def price_step(law: Law, workload: Workload, strategy_law: StrategyLaw | None = None, given: Given = Batch) -> Price:
    """Returns the price of an optimizer step: forward and backward of all its micro-batches, and the update.

    The price does not include the optimizer state. The optimizer has its own price for it.

    Args:
        law: the forward pass from a micro-batch to its summed loss.
        workload: the step.
        strategy_law: the law of the weights and gradients that a rank keeps and sends. None for a single process, which
            keeps all of them.
        given: function that makes the micro-batch for `law`.
    """
    strategy_law = strategy_law or StrategyLaw(weights(law, given), workload.precision)
    strategy_law.set_use_order(_uses(law, workload, given))
    tape = Tape(workload, strategy_law)
    num_played = min(workload.num_micro_batches, 3)
    wire: Counter[str] = Counter()
    for index in range(num_played):
        tape.counts.clear()
        strategy_law.wire.clear()
        strategy_law.begin_micro_batch(is_last=index == num_played - 1)
        batch = given(tape)
        num_waiting = workload.num_micro_batches - 1 - (index if index < 2 else workload.num_micro_batches - 1)
        waiting = strategy_law.make("batch_bytes", num_waiting * batch.num_bytes)
        loss = law(tape, batch)
        tape.end_forward()
        tape.backward(loss)
        del batch, loss, waiting
        # every micro-batch between the first and the last costs the same as the second
        times = workload.num_micro_batches - 2 if index == 1 and num_played == 3 else 1
        wire.update({name: num_bytes * times for name, num_bytes in strategy_law.wire.items()})
    gradients = strategy_law.gradients()
    strategy_law.wire.clear()
    strategy_law.update()
    wire.update(strategy_law.wire)
    once = Price(tape.counts)
    repeated = once.only(_REPEATED)
    entries: Counter[tuple[Kind, str]] = Counter(strategy_law.counts)
    for weight in strategy_law.weights:
        entries["parameters", weight.part] += weight.size
    entries.update({("gradient_bytes", part): num_bytes for part, num_bytes in gradients.items()})
    entries.update({("wire_bytes", name): num_bytes for name, num_bytes in wire.items()})
    for kind in ("gathered_bytes", "bucket_bytes", "workspace_bytes"):
        entries[kind, "at most"] = tape.live.most[kind]
    for (label, _), num_bytes in tape.live.peak.items():
        entries["peak_bytes", _AT_PEAK.get(label, label)] += num_bytes
    return once + repeated * (workload.num_micro_batches - 1) + Price(entries, unknown=frozenset(tape.unknown))


def price_state(uses: Sequence[tuple[Weight, bool]], workload: Workload, strategy_law: StrategyLaw) -> Price:
    """Returns the price of a step that only uses weights, one after another, and has no activations.

    Args:
        uses: for each use in the forward pass, in order: the weight, and whether backward uses the weight again.
            Backward does not use a frozen weight if no gradient flows through the operation.
        workload: the step.
        strategy_law: the law of the weights and gradients that a rank keeps and sends.
    """

    def law(tape: Tape, batch: Batch) -> Array:
        x = tape.new((), "float32")
        for weight, comes_back in uses:
            array = tape.weight(weight.name, *weight.shape)
            if comes_back:
                node = tape.save((x, array), (), partial(_gradient_of, tape, array if weight.is_trained else None))
                x = tape.new((), "float32", node)
        return x

    return price_step(law, workload, strategy_law)


def _gradient_of(tape: Tape, weight: Array | None, gradient: Array) -> tuple[Array, Array | None]:
    return tape.new((), "float32"), None if weight is None else tape.new(weight.shape, weight.dtype)


class _Rehearsal(StrategyLaw):
    """A strategy law that only records the uses of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[tuple[str, bool]] = []

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """Records the weight's name, and whether the use is in backward."""
        self.uses.append((weight.name, in_backward))


def _uses(law: Law, workload: Workload, given: Given) -> list[tuple[str, bool]]:
    rehearsal = _Rehearsal()
    tape = Tape(replace(workload, num_sequences=1, num_tokens=1), rehearsal)
    loss = law(tape, given(tape))
    tape.end_forward()
    tape.backward(loss)
    return rehearsal.uses


def weights(law: Law, given: Given = Batch) -> list[Weight]:
    """Returns all parameters that a law uses, each marked as trained."""
    tape = Tape(Workload(num_sequences=1, num_tokens=1, image_size=(1, 1)))
    law(tape, given(tape))
    return list(tape.weights.values())
