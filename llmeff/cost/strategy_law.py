"""The law of training in one process. It is the base class of the laws of all strategies."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from llmeff.core.precision import BYTES, Precision, precision
from llmeff.cost.arrays import Array, Live, Storage, Weight
from llmeff.cost.price import Kind


class StrategyLaw:
    """Counts the weights, gradients and other state that a rank keeps in a step, and the bytes that it sends.

    This class describes one process, which keeps all weights, and keeps each gradient from the backward pass that makes
    it until the update. Strategies override its methods, which the tape calls while it runs a step. All bytes have a
    label that says what they are for.

    Args:
        weights: all parameters, in the model's order.
        formats: the dtypes. None for fp32.
    """

    updates_on_host = False
    """Whether the optimizer state is in CPU memory, even if the model is on a GPU."""
    is_shared = False
    """Whether there are several ranks."""
    replaces_linear = False
    """Whether the strategy replaces `nn.functional.linear` with an autograd.Function that saves its inputs uncast."""

    def __init__(self, weights: Iterable[Weight] = (), formats: Precision | None = None):
        self.formats = formats or precision("fp32")
        self.every = [replace(weight, dtype=self.formats.parameters) for weight in weights]
        """All weights, trained and frozen."""
        self.weights = [weight for weight in self.every if weight.is_trained]
        self.wire: Counter[str] = Counter()
        """Bytes sent so far, by collective. The full payload counts, even if a rank has only a part of it."""
        self.counts: Counter[tuple[Kind, str]] = Counter()
        """Bytes that stay in memory throughout the step, by kind and part."""
        self.is_last = True
        """Whether this is the step's last micro-batch."""
        self.whole: dict[str, Array] = {}
        """Whole gradients from backward that are still in memory, by the weight's name."""
        self._held: defaultdict[str, list[Storage]] = defaultdict(list)

    def begin(self, live: Live) -> None:
        """Begins the step: adds the memory that stays allocated throughout it.

        Args:
            live: the counter of bytes in memory.
        """
        self._live = live
        self.add_resident()

    def add_resident(self) -> None:
        """Adds the memory that stays allocated throughout the step: every weight, and the master copies."""
        self.add_frozen()
        for weight in self.weights:
            self.keep("parameter_bytes", weight.part, weight.num_bytes)
            if self.formats.master is not None:
                self.keep("master_bytes", weight.part, weight.size * BYTES[self.formats.master])

    def add_frozen(self) -> None:
        """Adds every frozen weight, whole."""
        for weight in self.every:
            if not weight.is_trained:
                self.keep("frozen_bytes", weight.part, weight.num_bytes)

    def set_use_order(self, uses: list[tuple[str, bool]]) -> None:
        """Receives, before the step begins, the order in which the step will use weights.

        Args:
            uses: for each use, the weight's name and whether the use is in backward.
        """

    def begin_micro_batch(self, is_last: bool) -> None:
        """Called before the forward pass of a micro-batch."""
        self.is_last = is_last

    def on_use(self, weight: Weight, in_backward: bool) -> None:
        """Called before an operation reads a weight."""

    def on_gradient(self, weight: Weight, gradient: Array) -> None:
        """Called when a weight's gradient is ready. Keeps the first gradient. Later gradients add to it in place."""
        if weight.name not in self.whole:
            self.whole[weight.name] = gradient
            gradient.storage.relabel(("gradient_bytes", weight.part))

    def end_forward(self) -> None:
        """Called at the end of the forward pass, after the loss is computed."""

    def end_backward(self) -> None:
        """Called when all gradients of a micro-batch are ready."""

    def gradients(self) -> Counter[str]:
        """Returns the bytes of the gradients that are in memory between the last backward and the update, by part."""
        parts: Counter[str] = Counter()
        for weight in self.weights:
            if weight.name in self.whole:
                parts[weight.part] += self.whole[weight.name].storage.num_bytes
        return parts

    def update(self) -> None:
        """Called for the update. Counts bytes that clipping, update and clearing gradients allocate, send or free."""

    def updated(self) -> list[Weight]:
        """Returns the tensors that this process's optimizer updates. Their `part` also applies to optimizer state."""
        return [replace(weight, dtype=self.formats.master or weight.dtype) for weight in self.weights]

    # -- for strategies

    def make(self, label: str, num_bytes: int) -> Storage:
        """Adds bytes that stay in memory until the last reference to the returned `Storage` is gone."""
        return Storage(self._live, num_bytes, (label, ""))

    def hold(self, label: str, num_bytes: int) -> None:
        """Adds bytes that stay in memory until `drop` is called with the same label."""
        self._held[label].append(self.make(label, num_bytes))

    def drop(self, label: str) -> None:
        """Frees the bytes that `hold` added with this label."""
        self._held.pop(label, None)

    def keep(self, kind: Kind, part: str, num_bytes: int) -> None:
        """Adds bytes that stay in memory throughout the step, and counts them under their kind and part."""
        self.counts[kind, part] += num_bytes
        self.hold(kind, num_bytes)

    def send(self, collective: str, num_bytes: int) -> None:
        """Counts the bytes of a collective: its full payload, even if this rank has only a part of it."""
        self.wire[collective] += num_bytes
