"""What something costs, as integers by kind and part that can be added."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "parameters",
    "parameter_bytes",
    "master_bytes",
    "optimizer_bytes",
    "gradient_bytes",
    "frozen_bytes",
    "batch_bytes",
    "saved_bytes",
    "logits_bytes",
    "gathered_bytes",
    "bucket_bytes",
    "workspace_bytes",
    "peak_bytes",
    "model_flops",
    "executed_flops",
    "elementwise_ops",
    "wire_bytes",
]
"""What is counted of one optimizer step on one rank.

`parameters`: numbers that are trained. `parameter_bytes`, `master_bytes`, `optimizer_bytes`, `gradient_bytes`,
`frozen_bytes`: bytes of each kind of state, with padding; gradients are counted when the last backward pass is over.
`batch_bytes`: tokens, targets and positions of a micro-batch. `saved_bytes`: what autograd keeps of a micro-batch when
its forward pass ends, with autocast's copies of weights, without weights and `batch_bytes`; each storage counts once,
in the part that keeps it first. `logits_bytes`: one copy of the logits in the loss's format.

`gathered_bytes`, `bucket_bytes`: the most bytes at any time of parameters that were gathered from all ranks, and of
buffers for gradients. `workspace_bytes`: the most bytes at any time that libraries allocate beside tensors while
convolutions run on a CPU: copies in other layouts, and buffers. `peak_bytes`: what lives at the moment of the step when
most does, by kind. The last two are unknown if a convolution was not measured on the CPU's instruction set
(`workspace`); `peak_bytes` then has a lower bound.

`model_flops`: contractions only, multiply-add = 2, causal attention over T(T+1)/2 pairs, forward and backward without
recomputation. `executed_flops`: contractions as the kernels compute them: all T^2 pairs, and recomputation.
`elementwise_ops`: one for each number that anything but a contraction makes in forward. `wire_bytes`: the full payload
of each collective, whatever part of it a rank sends, by collective."""

KINDS: tuple[Kind, ...] = get_args(Kind)

REPORTED: tuple[Kind, ...] = (
    "parameters", "model_flops", "executed_flops", "wire_bytes", "saved_bytes", "optimizer_bytes", "peak_bytes",
)  # fmt: skip
"""The kinds that a run's result reports."""

_SUMS = ("total", "at_least")
"""Keys in JSON beside the parts of a kind."""

Source = Literal["law", "traced"]
"""`law`: computed from the config alone; `traced`: counted in a run of the module."""


@dataclass(frozen=True)
class Price:
    """Integers by (kind, part).

    >>> one = Price({("parameters", "mlp"): 6, ("parameters", "norms"): 2})
    >>> (one + 2 * one).total("parameters"), one.parts("parameters")
    (24, {'mlp': 6, 'norms': 2})
    """

    entries: Mapping[tuple[Kind, str], int] = field(default_factory=dict)
    source: Source = "law"
    unknown: frozenset[Kind] = frozenset()
    """Kinds of which some entries are missing."""

    def __post_init__(self) -> None:
        unknown = {kind for kind, _ in self.entries} - set(KINDS)
        if unknown:
            raise ValueError(f"no kinds of cost: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
        object.__setattr__(self, "entries", {key: count for key, count in self.entries.items() if count})

    def __add__(self, other: "Price") -> "Price":
        entries = Counter(dict(self.entries))
        entries.update(other.entries)
        source: Source = "law" if self.source == other.source == "law" else "traced"
        return Price(entries, source, self.unknown | other.unknown)

    def __mul__(self, times: int) -> "Price":
        return Price({key: count * times for key, count in self.entries.items()}, self.source, self.unknown)

    __rmul__ = __mul__

    def total(self, kind: Kind) -> int:
        """The sum over all parts; 0 if there are none.

        Raises:
            ValueError: the kind is unknown.
        """
        if kind in self.unknown:
            raise ValueError(f"{kind} is unknown here: ask `known` or `at_least`")
        return self.at_least(kind)

    def known(self, kind: Kind) -> int | None:
        """The sum over all parts; None if the kind is unknown."""
        return None if kind in self.unknown else self.at_least(kind)

    def at_least(self, kind: Kind) -> int:
        """The sum over all parts that are known."""
        return sum(self.parts(kind).values())

    def parts(self, kind: Kind) -> dict[str, int]:
        """The counts of one kind by part."""
        return {part: count for (other, part), count in self.entries.items() if other == kind}

    def reported(self) -> dict[Kind, float]:
        """The totals of `REPORTED` that are known and not 0."""
        return {kind: float(total) for kind in REPORTED if (total := self.known(kind))}

    def only(self, kinds: Iterable[Kind]) -> "Price":
        """The entries of these kinds."""
        wanted = set(kinds)
        entries = {key: count for key, count in self.entries.items() if key[0] in wanted}
        return Price(entries, self.source, self.unknown & wanted)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the source, and for each kind its parts and their `total`.

        If the total is unknown, it is null, and `at_least` is beside it.
        """
        kinds = [kind for kind in KINDS if kind in self.unknown or self.parts(kind)]
        return {"source": self.source} | {kind: {**self.parts(kind), **self._sums(kind)} for kind in kinds}

    def _sums(self, kind: Kind) -> dict[str, int | None]:
        if kind in self.unknown:
            return {"total": None, "at_least": self.at_least(kind)}
        return {"total": self.total(kind)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Price":
        """Reads what `as_dict` returns."""
        return cls(
            {(kind, part): count for kind in KINDS for part, count in data.get(kind, {}).items() if part not in _SUMS},
            data["source"],
            frozenset(kind for kind in KINDS if "at_least" in data.get(kind, {})),
        )
