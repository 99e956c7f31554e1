"""Prices: costs as integers, by kind of cost and part of the model, which can be added."""

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
"""Kinds of cost of one optimizer step on one rank.

`parameters`: number of trained elements. `parameter_bytes`, `master_bytes`, `optimizer_bytes`, `gradient_bytes`,
`frozen_bytes`: bytes of each kind of state, with padding. Gradients are counted at the end of the last backward pass.
`batch_bytes`: tokens, targets and positions of a micro-batch. `saved_bytes`: bytes that autograd keeps for backward at
the end of a micro-batch's forward pass. They include autocast's copies of weights, but not weights and `batch_bytes`.
Each storage counts once, in the part that saves it first. `logits_bytes`: one copy of the logits in the loss's dtype.

`gathered_bytes`: the maximum over time of parameters gathered from all ranks. `bucket_bytes`: the maximum over time of
buffers for communication and updates, such as gradient buckets. `workspace_bytes`: the maximum over time of memory that
libraries allocate besides tensors on a CPU, such as copies of a convolution's inputs in another layout. `peak_bytes`:
all bytes in memory at the peak of the step, by kind. `workspace_bytes` and `peak_bytes` are unknown if a convolution
was not measured on the CPU's instruction set (`workspace`). Then only a lower bound of `peak_bytes` is known.

`model_flops`: FLOPs of contractions in forward and backward without recomputation. A multiply-add is 2 FLOPs, and
causal attention has T(T+1)/2 pairs. `executed_flops`: FLOPs of contractions as the kernels execute them, with all T^2
pairs and with recomputation. `elementwise_ops`: number of output elements of all forward operations except
contractions. `wire_bytes`: bytes of each collective, by collective. The full payload counts, even if a rank sends only
a part of it."""

KINDS: tuple[Kind, ...] = get_args(Kind)

REPORTED: tuple[Kind, ...] = (
    "parameters", "model_flops", "executed_flops", "wire_bytes", "saved_bytes", "optimizer_bytes", "peak_bytes",
)  # fmt: skip
"""The kinds that a run's result reports."""

_SUMS = ("total", "at_least")
"""Keys of sums in JSON. All other keys of a kind are parts."""

Source = Literal["law", "traced"]
"""`law`: computed from the config alone. `traced`: counted in a run of the module."""


@dataclass(frozen=True)
class Price:
    """A cost: for each kind of cost and part of the model, an integer.

    >>> one = Price({("parameters", "mlp"): 6, ("parameters", "norms"): 2})
    >>> (one + 2 * one).total("parameters"), one.parts("parameters")
    (24, {'mlp': 6, 'norms': 2})
    """

    entries: Mapping[tuple[Kind, str], int] = field(default_factory=dict)
    source: Source = "law"
    unknown: frozenset[Kind] = frozenset()
    """Kinds for which some entries are missing."""

    def __post_init__(self) -> None:
        unknown = {kind for kind, _ in self.entries} - set(KINDS)
        if unknown:
            raise ValueError(f"unknown kinds of cost: {', '.join(sorted(unknown))}. Allowed: {', '.join(KINDS)}")
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
        """Returns the sum over all parts, or 0 if there are no parts.

        Raises:
            ValueError: the kind is in `unknown`, so its sum is incomplete.
        """
        if kind in self.unknown:
            raise ValueError(f"the total {kind} of this price is unknown. Use `known` or `at_least` instead of `total`")
        return self.at_least(kind)

    def known(self, kind: Kind) -> int | None:
        """Returns the sum over all parts, or None if the kind is in `unknown`."""
        return None if kind in self.unknown else self.at_least(kind)

    def at_least(self, kind: Kind) -> int:
        """Returns the sum over all known parts. If the kind is in `unknown`, this is only a lower bound."""
        return sum(self.parts(kind).values())

    def parts(self, kind: Kind) -> dict[str, int]:
        """Returns the counts of one kind, by part."""
        return {part: count for (other, part), count in self.entries.items() if other == kind}

    def reported(self) -> dict[Kind, float]:
        """Returns the totals of the kinds in `REPORTED` that are known and not 0."""
        return {kind: float(total) for kind in REPORTED if (total := self.known(kind))}

    def only(self, kinds: Iterable[Kind]) -> "Price":
        """Returns a price with only the entries of these kinds."""
        wanted = set(kinds)
        entries = {key: count for key, count in self.entries.items() if key[0] in wanted}
        return Price(entries, self.source, self.unknown & wanted)

    def as_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON: the source, and for each kind its parts and their `total`.

        If a total is unknown, it is None, and the additional key `at_least` has the sum of the known parts.
        """
        kinds = [kind for kind in KINDS if kind in self.unknown or self.parts(kind)]
        return {"source": self.source} | {kind: {**self.parts(kind), **self._sums(kind)} for kind in kinds}

    def _sums(self, kind: Kind) -> dict[str, int | None]:
        if kind in self.unknown:
            return {"total": None, "at_least": self.at_least(kind)}
        return {"total": self.total(kind)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Price":
        """Restores a price from the result of `as_dict`."""
        return cls(
            {(kind, part): count for kind in KINDS for part, count in data.get(kind, {}).items() if part not in _SUMS},
            data["source"],
            frozenset(kind for kind in KINDS if "at_least" in data.get(kind, {})),
        )
