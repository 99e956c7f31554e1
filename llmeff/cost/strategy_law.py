"""The law of one process alone, from which strategies derive theirs: what lives in a step, and what is sent."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from llmeff.core.precision import BYTES, Precision, precision
from llmeff.cost.arrays import Array, Live, Storage, Weight
from llmeff.cost.price import Kind


class StrategyLaw:
    """One process alone keeps all weights, and every gradient from the backward pass that makes it until the update.

    Strategies override its methods. The tape calls them as it plays a step. All bytes have a label that says what they
    are for.

    Args:
        weights: all parameters, in the model's order.
        formats: the number formats; None: fp32.
    """

    updates_on_host = False
    """Whether the optimizer's state is in CPU memory, even if the model is on a GPU."""
    is_shared = False
    """Whether there are several ranks."""
    replaces_linear = False
    """Whether `torch.nn.functional.linear` is replaced by an autograd.Function, which saves input and weight uncast."""

    def __init__(self, weights: Iterable[Weight] = (), formats: Precision | None = None):
        self.formats = formats or precision("fp32")
        self.every = [replace(weight, dtype=self.formats.parameters) for weight in weights]
        """All weights, trained and frozen."""
        self.weights = [weight for weight in self.every if weight.is_trained]
        self.wire: Counter[str] = Counter()
        """Bytes sent so far, by collective; each counts with its full payload, whatever part of it a rank has."""
        self.counts: Counter[tuple[Kind, str]] = Counter()
        """Bytes that live throughout the step, by kind and part."""
        self.is_last = True
        """Whether this is the step's last micro-batch."""
        self.whole: dict[str, Array] = {}
        """Whole gradients as backward makes them, by the weight's name."""
        self._held: defaultdict[str, list[Storage]] = defaultdict(list)

    def begin(self, live: Live) -> None:
        """Begins the step: adds what lives throughout it.

        Args:
            live: counts the bytes that live.
        """
        self._live = live
        self.add_resident()

    def add_resident(self) -> None:
        """Adds what lives throughout the step: every weight, and the master copies."""
        self.add_frozen()
        for weight in self.weights:
            self.keep("parameter_bytes", weight.part, weight.num_bytes)
            if self.formats.master is not None:
                self.keep("master_bytes", weight.part, weight.size * BYTES[self.formats.master])

    def add_frozen(self) -> None:
        """Adds the frozen weights, whole."""
        for weight in self.every:
            if not weight.is_trained:
                self.keep("frozen_bytes", weight.part, weight.num_bytes)

    def set_use_order(self, uses: list[tuple[str, bool]]) -> None:
        """Learns the order in which the step will use weights, before it begins.

        Args:
            uses: the name of the weight, and whether the use is in backward.
        """

    def begin_micro_batch(self, is_last: bool) -> None:
        """Called before the forward pass of a micro-batch."""
        self.is_last = is_last

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """Called before an operation reads a weight."""

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Called when a weight's gradient of a backward pass is ready: keeps the first, adds later ones in place."""
        if weight.name not in self.whole:
            self.whole[weight.name] = gradient
            gradient.storage.relabel(("gradient_bytes", weight.part))

    def end_forward(self) -> None:
        """Called after the loss."""

    def end_backward(self) -> None:
        """Called when all gradients of a micro-batch are ready."""

    def gradients(self) -> Counter[str]:
        """Bytes of gradients between backward and update, by part."""
        parts: Counter[str] = Counter()
        for weight in self.weights:
            if weight.name in self.whole:
                parts[weight.part] += self.whole[weight.name].storage.num_bytes
        return parts

    def update(self) -> None:
        """Called for the update: what clipping, the update and clearing gradients add, send and free."""

    def updated(self) -> list[Weight]:
        """The tensors that this process's optimizer updates; its state is counted by their parts."""
        return [replace(weight, dtype=self.formats.master or weight.dtype) for weight in self.weights]

    # -- for strategies

    def make(self, label: str, num_bytes: int) -> Storage:
        """Adds bytes that live until the last reference to the result is gone."""
        return Storage(self._live, num_bytes, (label, ""))

    def hold(self, label: str, num_bytes: int) -> None:
        """Adds bytes that live until `drop`."""
        self._held[label].append(self.make(label, num_bytes))

    def drop(self, label: str) -> None:
        """Frees what `hold` added."""
        self._held.pop(label, None)

    def keep(self, kind: Kind, part: str, num_bytes: int) -> None:
        """Adds bytes that live throughout the step, and counts them under their kind and part."""
        self.counts[kind, part] += num_bytes
        self.hold(kind, num_bytes)

    def send(self, collective: str, num_bytes: int) -> None:
        """Counts a collective with its full payload."""
        self.wire[collective] += num_bytes
