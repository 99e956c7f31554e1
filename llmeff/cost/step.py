"""The price of a whole optimizer step, from the law of a forward pass."""

from collections import Counter
from collections.abc import Callable

from llmeff.core.precision import BYTES
from llmeff.cost.laws import Batch
from llmeff.cost.price import Kind, Price
from llmeff.cost.tape import Array, Tape, Weight
from llmeff.cost.workload import Workload

_REPEATED: tuple[Kind, ...] = ("model_flops", "executed_flops", "elementwise_ops")
_AT_PEAK = {
    "gradient_bytes": "gradients",
    "saved_bytes": "saved activations",
    "batch_bytes": "batch",
    "workspace": "workspace",
}


def price_step(law: Callable[[Tape, Batch], Array], workload: Workload) -> Price:
    """Plays forward and backward of a step's micro-batches.

    The optimizer's state, which lives at every moment, is not in it: an optimizer's own price adds it.

    Args:
        law: the forward pass of a micro-batch to its summed loss.
        workload: what the step does.
    """
    tape = Tape(workload)
    # the second and all later micro-batches find gradients there, and are alike
    for _ in range(min(workload.num_micro_batches, 2)):
        tape.counts.clear()
        batch = Batch(tape)
        loss = law(tape, batch)
        tape.end_forward()
        tape.backward(loss)
        del batch, loss
    once = Price(tape.counts)
    repeated = once.only(_REPEATED)
    return once + repeated * (workload.num_micro_batches - 1) + _state(tape)


def weights(law: Callable[[Tape, Batch], Array]) -> list[Weight]:
    """The trained parameters that a law uses."""
    tape = Tape(Workload(num_sequences=1, num_tokens=1))
    law(tape, Batch(tape))
    return list(tape.weights.values())


def _state(tape: Tape) -> Price:
    entries: Counter[tuple[Kind, str]] = Counter()
    master = tape.precision.master
    for weight in tape.weights.values():
        entries["parameters", weight.part] += weight.size
        entries["parameter_bytes", weight.part] += weight.num_bytes
        entries["gradient_bytes", weight.part] += weight.size * BYTES[tape.precision.gradients]
        entries["master_bytes", weight.part] += weight.size * BYTES[master] if master else 0
    for (label, _), num_bytes in tape.live.peak.items():
        entries["peak_bytes", _AT_PEAK[label]] += num_bytes
    held = Price(entries)
    always = {"parameters": held.total("parameter_bytes"), "master copy": held.total("master_bytes")}
    return held + Price({("peak_bytes", part): num_bytes for part, num_bytes in always.items()})
