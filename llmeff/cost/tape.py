"""The tape: runs a training step on shapes alone, and counts FLOPs, operations and the bytes in memory at each moment.

A law is a forward pass written over `Array`s, which have a shape and a dtype but no values. As in eager PyTorch, an
array's bytes are in memory until the last reference to them is gone. A reference is a local variable of the law, or a
node that saves the array for backward. If the variables of a law live as long as those of the module, the law gives the
module's memory at every moment, to the byte.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

from llmeff.cost.arrays import NUM_BYTES, Backward, Live, Node, Storage
from llmeff.cost.arrays import Array as Array
from llmeff.cost.arrays import Weight as Weight
from llmeff.cost.price import Kind
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.workload import Workload
from llmeff.cost.workspace import Room


@dataclass(slots=True, kw_only=True)
class Leaf(Node):
    """Sums a weight's gradients. After the weight's last use in backward, passes the sum to the strategy's law."""

    weight: Weight
    strategy_law: StrategyLaw
    num_awaited: int = 0

    def accumulate(self, gradient: Array) -> None:
        """Keeps the first gradient and adds later gradients to it in place."""
        Node.accumulate(self, gradient)
        self.num_awaited -= 1
        if self.num_awaited or self.gradient is None:
            return
        whole, self.gradient = self.gradient, None
        self.strategy_law.on_gradient(self.weight, whole)


class Tape:
    """Records one rank's optimizer step.

    Args:
        workload: the step.
        strategy_law: the law of the weights and gradients that the rank keeps and sends. If None, nothing is sent, and
            weights are not counted.
    """

    def __init__(self, workload: Workload, strategy_law: StrategyLaw | None = None):
        self.workload = workload
        self.strategy_law = strategy_law or StrategyLaw()
        self.precision = workload.precision
        self.weights: dict[str, Weight] = {}
        self.live = Live()
        self.counts: Counter[tuple[Kind, str]] = Counter()
        self.unknown: set[Kind] = set()
        """Kinds of cost that could not be counted completely."""
        self._static = Storage(Live(), 0, ("", ""))
        self._leaves: dict[str, Leaf] = {}
        self._casts: dict[str, Array] = {}
        self._nodes: list[Node] = []
        self._path: tuple[str, ...] = ()
        self._part = ""
        self._keeps = True
        self._saves_left: int | None = None
        self._num_saves = 0
        self._recomputes = self._in_backward = self._is_inside = False
        self.strategy_law.begin(self.live)

    @contextmanager
    def within(self, name: str, part: str | None = None) -> Iterator[None]:
        """A context for the operations of a submodule.

        Args:
            name: the submodule's name.
            part: the part of the price that these operations count for. None keeps the current part.
        """
        outer = self._path, self._part
        self._path, self._part = (*self._path, name), part or self._part
        try:
            yield
        finally:
            self._path, self._part = outer

    def weight(self, name: str, *shape: int) -> Array:
        """Returns a trained parameter of the current submodule. Equal names return the same parameter."""
        full = ".".join((*self._path, name))
        if full not in self.weights:
            self.weights[full] = Weight(full, shape, self.precision.parameters, self._part)
        leaf = self._leaves.setdefault(full, Leaf(weight=self.weights[full], strategy_law=self.strategy_law))
        self.strategy_law.on_use(self.weights[full], in_backward=self._in_backward)
        return Array(shape, self.precision.parameters, self._static, leaf)

    def cached(self, weight: Array, make: Callable[[], Array]) -> Array:
        """Returns autocast's copy of a weight in the compute dtype. Calls `make` for it once per forward pass."""
        assert isinstance(weight.node, Leaf)
        name = weight.node.weight.name
        if name not in self._casts:
            self._casts[name] = make()
        return self._casts[name]

    def save(self, inputs: tuple[Array, ...], saved: tuple[Array, ...], backward: Backward | None) -> Node | None:
        """Records an operation. Call it before the operation's output is made.

        The order matters because recomputation in PyTorch stops as soon as it has saved the last tensor.

        Args:
            inputs: the arrays that get a gradient, in the order in which `backward` returns the gradients.
            saved: the arrays that are saved for backward.
            backward: makes the gradients. None if the caller sets the node's `replay`.

        Returns:
            The operation's node. None if no backward graph is recorded, as in the first pass of recomputed layers.
        """
        self._count_saves(len(saved))
        if not self._keeps:
            return None
        for array in inputs:
            if isinstance(array.node, Leaf):
                array.node.num_awaited += 1
        node = Node(tuple(array.node for array in inputs), (), None if backward is None else self._in_part(backward))
        self._nodes.append(node)
        self._keep(node, saved)
        return node

    def save_output(self, node: Node | None, *outputs: Array) -> None:
        """Saves outputs of an operation for its backward, which gets them after the arrays given to `save`."""
        self._count_saves(len(outputs))
        if node is not None:
            self._keep(node, outputs)

    def _count_saves(self, number: int) -> None:
        if self._is_inside:
            return
        self._num_saves += number
        if self._saves_left is not None:
            self._saves_left -= number

    def _keep(self, node: Node, arrays: tuple[Array, ...]) -> None:
        for array in arrays:
            if array.storage.label[0] == "temporaries":
                array.storage.relabel(("saved_bytes", self._part))
        node.saved += tuple(Array(array.shape, array.dtype, array.storage) for array in arrays)

    def _in_part(self, backward: Backward) -> Backward:
        def run(*arrays: Array) -> tuple[Array | None, ...]:
            outer, self._part = self._part, part
            gradients = backward(*arrays)
            self._part = outer
            return gradients

        part = self._part
        return run

    def new(self, shape: tuple[int, ...], dtype: str, node: Node | None = None) -> Array:
        """Makes a new array. `node` is the operation that it results from."""
        num_bytes = 0 if self._has_stopped else prod(shape) * NUM_BYTES[dtype]
        return Array(shape, dtype, Storage(self.live, num_bytes, ("temporaries", self._part)), node)

    def workspace(self, num_bytes: int) -> Storage:
        """Adds bytes that a library allocates besides tensors. They are freed with the returned `Storage`."""
        return Storage(self.live, 0 if self._has_stopped else num_bytes, ("workspace_bytes", self._part))

    @contextmanager
    def room(self, found: Room | None) -> Iterator[None]:
        """A context in which to make the result of one contraction of a convolution. Counts the bytes of `found`.

        Args:
            found: the workspace of the contraction. None if it is unknown.
        """
        if found is None:
            self.unknown |= {"workspace_bytes", "peak_bytes"}
            found = Room()
        result = self.workspace(found.result)
        during = self.workspace(found.during)
        del during
        yield
        del result

    def given(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Makes a new array that belongs to the batch, and so is in memory before the forward pass."""
        array = Array(shape, dtype, Storage(self.live, prod(shape) * NUM_BYTES[dtype], ("batch_bytes", "batch")))
        self.counts["batch_bytes", "batch"] += array.storage.num_bytes
        return array

    def elementwise(self, shape: tuple[int, ...], dtype: str, node: Node | None = None) -> Array:
        """Makes the output of an operation other than a contraction, and counts the operation."""
        if not self._recomputes:
            self.counts["elementwise_ops", self._part] += prod(shape)
        return self.new(shape, dtype, node)

    def elementwise_in_place(self, x: Array) -> None:
        """Counts an in-place operation other than a contraction."""
        if not self._recomputes:
            self.counts["elementwise_ops", self._part] += x.size

    def contract(self, flops: int, model_flops: int | None = None) -> None:
        """Counts a contraction in the forward pass.

        Args:
            flops: executed FLOPs of the forward pass. Backward counts its own with `execute`.
            model_flops: model FLOPs of the forward pass. None if they equal `flops`. For backward, twice this number is
                added.
        """
        self.execute(flops)
        if not self._recomputes:
            self.counts["model_flops", self._part] += 3 * (flops if model_flops is None else model_flops)

    def execute(self, flops: int) -> None:
        """Counts executed FLOPs of contractions."""
        if not self._has_stopped:
            self.counts["executed_flops", self._part] += flops

    @property
    def _has_stopped(self) -> bool:
        return self._saves_left is not None and self._saves_left <= 0

    def checkpoint(self, run: Callable[[Array], Array], x: Array) -> Array:
        """Runs a part of the forward pass under activation checkpointing (Chen et al. 2016).

        Only the input `x` is saved, and backward runs the part again.
        """
        self._keeps, before = False, self._num_saves
        y = run(x)
        self._keeps = True
        place = self._path, self._part
        again = partial(self._again, run, self._num_saves - before, place, x.node is not None)
        with self.within("", "layer inputs"):
            node = self.save((x,), (x,), None)
        if node is not None:
            node.replay = again
        return Array(y.shape, y.dtype, y.storage, node)

    def _again(
        self,
        run: Callable[[Array], Array],
        num_saves: int,
        place: tuple[tuple[str, ...], str],
        flows_on: bool,
        gradients: list[Array],
        x: Array,
    ) -> Array | None:
        start = Array(x.shape, x.dtype, x.storage, Node() if flows_on else None)
        outer = self._nodes, self._path
        self._nodes, (self._path, self._part) = [], place
        self._recomputes, self._saves_left = True, num_saves
        end = run(start).node
        self._recomputes, self._saves_left = False, None
        self._casts.clear()
        assert end is not None
        end.accumulate(gradients.pop())
        del end  # it would keep arrays in memory that backward frees
        self._play_back()
        self._nodes, self._path = outer
        return None if start.node is None else start.node.gradient

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A context for the forward pass of an autograd.Function, where operations save nothing."""
        outer = self._keeps, self._is_inside
        self._keeps, self._is_inside = False, True
        try:
            yield
        finally:
            self._keeps, self._is_inside = outer

    def run_again(
        self,
        run: Callable[..., tuple[Array, ...]],
        starts: Sequence[Array | None],
        flows: Sequence[bool],
        given_gradients: Callable[[], list[Array]],
    ) -> list[Array | None]:
        """Runs the backward of an autograd.Function whose backward recomputes the forward pass under autograd.

        Args:
            run: the forward pass.
            starts: the inputs.
            flows: for each input, whether it gets a gradient.
            given_gradients: makes the gradients of the outputs.

        Returns:
            For each input its gradient, or None if it gets no gradient.
        """
        outer, self._nodes = self._nodes, []
        recomputed, self._recomputes = self._recomputes, True
        leaves = [Node() if flow else None for flow in flows]
        given = [
            None if x is None else Array(x.shape, x.dtype, x.storage, leaf)
            for x, leaf in zip(starts, leaves, strict=True)
        ]
        # backward needs only the nodes of the outputs, not the outputs
        nodes = [end.node for end in run(*given)]
        above = given_gradients()  # autograd.grad keeps them until it returns
        for node, gradient in zip(nodes, above, strict=True):
            assert node is not None
            node.accumulate(gradient)
        del gradient, node
        self._recomputes = recomputed
        self._play_back()
        del above
        self._nodes = outer
        return [None if leaf is None else leaf.gradient for leaf in leaves]

    def end_forward(self) -> None:
        """Ends a micro-batch's forward pass. Frees autocast's copies of weights unless they are saved for backward."""
        self._casts.clear()
        self.strategy_law.end_forward()
        for (label, part), num_bytes in self.live.now.items():
            if label == "saved_bytes":
                self.counts["saved_bytes", part] = num_bytes

    def backward(self, loss: Array) -> None:
        """Runs the backward pass of a scalar loss."""
        assert loss.node is not None
        loss.node.accumulate(self.new(loss.shape, loss.dtype))
        self._in_backward = True
        self._play_back()
        self._in_backward = False
        self.strategy_law.end_backward()

    def _play_back(self) -> None:
        while self._nodes:
            node = self._nodes.pop()
            gradient, node.gradient = node.gradient, None
            if gradient is None or (node.backward is None and node.replay is None):
                continue
            for below in node.inputs:
                if isinstance(below, Leaf):
                    self.strategy_law.on_use(below.weight, in_backward=True)
            if node.replay is not None:
                handed, replay = [gradient], node.replay
                node.replay = None  # frees the arrays that it refers to
                del gradient
                gradients = [replay(handed, *node.saved)]
                del replay
            else:
                assert node.backward is not None
                gradients = list(node.backward(gradient, *node.saved))[::-1]
                del gradient
            node.saved = ()
            for below in node.inputs:
                arrived = gradients.pop()
                if below is not None and arrived is not None:
                    below.accumulate(arrived)
                del arrived
