"""What a process keeps of weights, gradients and optimizer state while a step is played, and what it sends to others."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from llmeff.core.precision import BYTES, Precision, precision
from llmeff.cost.arrays import Array, Live, Storage, Weight
from llmeff.cost.price import Kind


class StrategyLaw:
    """One process alone: all weights, and every gradient from the backward pass that makes it to the update.

    A strategy derives its own. The tape calls it as the step goes; what it makes live is labelled by what it is for.

    Args:
        weights: the parameters, in the model's order.
        formats: of the numbers.
    """

    updates_on_host = False
    """Whether the optimizer's state lies in CPU memory, wherever the model is."""
    is_shared = False
    """Whether there are other ranks."""
    replaces_linear = False
    """Whether `torch.nn.functional.linear` is an autograd.Function, which keeps its input and weight without casts."""

    def __init__(self, weights: Iterable[Weight] = (), formats: Precision | None = None):
        self.formats = formats or precision("fp32")
        self.every = [replace(weight, dtype=self.formats.parameters) for weight in weights]
        """All weights, frozen ones too."""
        self.weights = [weight for weight in self.every if weight.is_trained]
        self.wire: Counter[str] = Counter()
        """Bytes sent so far, by collective: the full payload of each, whatever part of it a rank holds."""
        self.counts: Counter[tuple[Kind, str]] = Counter()
        """What is kept, told by kind and part."""
        self.is_last = True
        """Whether this is the step's last micro-batch."""
        self.whole: dict[str, Array] = {}
        """Gradients as backward makes them, by the weight's name."""
        self._held: defaultdict[str, list[Storage]] = defaultdict(list)

    def begin(self, live: Live) -> None:
        """Makes live what lives at every moment."""
        self._live = live
        self.add_resident()

    def add_resident(self) -> None:
        """Every weight, with its master copy."""
        self.add_frozen()
        for weight in self.weights:
            self.keep("parameter_bytes", weight.part, weight.num_bytes)
            if self.formats.master is not None:
                self.keep("master_bytes", weight.part, weight.size * BYTES[self.formats.master])

    def add_frozen(self) -> None:
        """What is not trained, whole."""
        for weight in self.every:
            if not weight.is_trained:
                self.keep("frozen_bytes", weight.part, weight.num_bytes)

    def set_use_order(self, uses: list[tuple[str, bool]]) -> None:
        """Told before the step: the names of the weights in the order of their uses, and whether in backward."""

    def begin_micro_batch(self, is_last: bool) -> None:
        """A micro-batch begins."""
        self.is_last = is_last

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """An operation is about to read a weight."""

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """A weight has its gradient of a backward pass: the first is kept, and later ones are added in its place."""
        if weight.name not in self.whole:
            self.whole[weight.name] = gradient
            gradient.storage.relabel(("gradient_bytes", weight.part))

    def end_forward(self) -> None:
        """The loss is there."""

    def end_backward(self) -> None:
        """All gradients of a micro-batch are there."""

    def gradients(self) -> Counter[str]:
        """The bytes of gradients between backward and update, by part."""
        parts: Counter[str] = Counter()
        for weight in self.weights:
            if weight.name in self.whole:
                parts[weight.part] += self.whole[weight.name].storage.num_bytes
        return parts

    def update(self) -> None:
        """Clips, updates, and clears the gradients."""

    def updated(self) -> list[Weight]:
        """The tensors that this process's optimizer updates; their parts tell its state apart."""
        return [replace(weight, dtype=self.formats.master or weight.dtype) for weight in self.weights]

    # -- for strategies

    def make(self, label: str, num_bytes: int) -> Storage:
        """Bytes that live until the last reference to what is returned goes."""
        return Storage(self._live, num_bytes, (label, ""))

    def hold(self, label: str, num_bytes: int) -> None:
        """Bytes that live until `drop`."""
        self._held[label].append(self.make(label, num_bytes))

    def drop(self, label: str) -> None:
        """Frees what `hold` made."""
        self._held.pop(label, None)

    def keep(self, kind: Kind, part: str, num_bytes: int) -> None:
        """Bytes that live at every moment, and are counted as what they are."""
        self.counts[kind, part] += num_bytes
        self.hold(kind, num_bytes)

    def send(self, collective: str, num_bytes: int) -> None:
        """Counts a collective by its full payload."""
        self.wire[collective] += num_bytes
