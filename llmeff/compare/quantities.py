"""The quantities that arms are compared by: what a run costs or reaches, and how to read it from a ledger entry."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmeff.compare.ledger import LOSS, Entry, Metric
from llmeff.core.metric import Direction

Value = Callable[[Entry], float | None]
"""Returns a value of a run, or None if the run does not have it."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity that a run costs or reaches, such as the final loss or the peak memory."""

    key: str
    """The identifier, used in JSON and CSV."""
    label: str
    """The display name."""
    show: str
    """How a value is formatted: `number`, `count`, `memory`, `duration` or `energy`."""
    value: Value = field(compare=False, repr=False)
    """Returns the value of a run."""
    predicted: Value | None = field(default=None, compare=False, repr=False)
    """Returns the value that the price of a run predicts. None if prices do not predict this quantity."""
    better: Direction = "lower"
    """Whether a lower or a higher value is better."""
    depends_on_seed: bool = True
    """Whether the value varies at random with the seed. If so, the seeds are the replicates. If not, as for time and
    memory, every run is a replicate."""
    timed: Literal["step", "steps"] | None = None
    """How the value uses the timing run: `step` if it is the time of one step, `steps` if it is a number of steps times
    the step time. None if it needs no timing run."""
    has_effects: bool = True
    """Whether the effects of factors on this quantity are estimated from the runs. False for times, and for a quantity
    whose ratios repeat those of another quantity."""


def by_seed(quantity: Quantity, runs: Sequence[Entry]) -> dict[int, float]:
    """Returns the value of each run of an arm, by seed. Runs without a finite value are absent."""
    found = ((run.seed, quantity.value(run)) for run in runs)
    return {seed: value for seed, value in found if value is not None and math.isfinite(value)}


# -- reading a run's curve


def value_at(entry: Entry, steps: float, metric: Metric = LOSS) -> float | None:
    """Returns the metric after a number of steps, interpolated linearly between evaluations.

    Returns None before the first and after the last evaluation, and if some evaluation lacks the metric.
    """
    values = entry.curve(metric.name)
    if not values:
        return None
    last = entry.curve_steps[-1]
    if steps <= last * (1 + 1e-9):  # rounding must not move it past the last evaluation
        steps = min(steps, last)
    if not entry.curve_steps[0] <= steps <= last:
        return None
    return float(np.interp(steps, entry.curve_steps, values))


def steps_to(entry: Entry, target: float, metric: Metric = LOSS) -> float | None:
    """Returns the number of steps after which the metric first reaches the target.

    Interpolates linearly between evaluations. Returns None if no evaluation reaches the target.
    """
    before: tuple[float, float] | None = None
    values = entry.curve(metric.name)
    for step, value in zip(entry.curve_steps if values else (), values, strict=True):
        if metric.sign * value <= metric.sign * target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        if math.isfinite(value):
            before = float(step), value
    return None


# -- targets and budgets


def target_of(runs: Sequence[Entry], metric: Metric) -> float | None:
    """Returns the best value of the metric that every finished run reaches. None if there is no such value.

    The value is rounded to five significant digits in the worse direction, so that runs that differ only by rounding
    reach it too.
    """
    curves = [run.curve(metric.name) for run in runs if run.is_done and run.curve(metric.name)]
    value = metric.sign * max((min(map(metric.cost, curve)) for curve in curves), default=math.inf)
    if not math.isfinite(value):
        return None
    digit = 10.0 ** (math.floor(math.log10(value)) - 4) if value > 0 else 1.0
    return (math.ceil if metric.better == "lower" else math.floor)(value / digit) * digit


def budgets_of(arms: Mapping[str, Sequence[Entry]], times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the least FLOPs (`flops`) and the least time (`seconds`) that any finished run spent.

    Args:
        arms: the runs of each arm.
        times: seconds per step of the arms that were timed.

    Returns:
        The budgets. `flops` is absent if no run has FLOPs. `seconds` is absent if some arm was not timed.
    """
    done = [run for runs in arms.values() for run in runs if run.is_done]
    flops = [run.step_flops * run.steps for run in done if run.step_flops]
    budgets = {"flops": min(flops)} if flops else {}
    if done and arms.keys() <= times.keys():
        budgets["seconds"] = min(statistics.fmean(times[run.arm]) * run.steps for run in done)
    return budgets


# -- the quantities

_FINAL_LABELS = {"bits_per_byte": "bits per byte"}
"""Display names of final values, for metrics whose display name is not `final` followed by the metric."""


def quantities_of(
    metrics: Sequence[Metric],
    target: float | None,
    budgets: Mapping[str, float],
    times: Mapping[str, Sequence[float]],
) -> list[Quantity]:
    """Returns all quantities in display order.

    Args:
        metrics: the metrics that runs are judged by. The first is the main metric.
        target: a value of the main metric. The `..._to_target` quantities are the cost of a run until it reaches this
            value. None if there is no target.
        budgets: the budgets from `budgets_of`.
        times: seconds per step of the arms that were timed.
    """
    deciding = metrics[0]

    def step_s(entry: Entry) -> float | None:
        return statistics.fmean(times[entry.arm]) if entry.arm in times else None

    return [
        *(_final(metric, is_deciding=metric == deciding) for metric in metrics),
        *_at_equal_budgets(deciding, budgets, step_s),
        *_to_target(deciding, target, step_s),
        Quantity(
            key="step_s", label="time of a step", show="duration", depends_on_seed=False, timed="step", value=step_s,
            has_effects=False,
        ),
        *_MEMORY,
        # With another main metric, the training loss may be weighted, so the gap would not measure overfitting.
        *([_GAP] if deciding.name in ("loss", *_FINAL_LABELS) else []),
    ]  # fmt: skip


def _of_done(value: Value) -> Value:
    """Wraps `value`, which reads a quantity of a run, so that it returns None if the run did not finish."""
    return lambda entry: value(entry) if entry.is_done else None


def _final(metric: Metric, *, is_deciding: bool) -> Quantity:
    return Quantity(
        key=metric.name,
        label=_FINAL_LABELS.get(metric.name, f"final {metric.label}"),
        show="number",
        better=metric.better,
        value=_of_done(lambda entry: entry.final(metric.name)),
        # For runs on the same data, ratios of bits per byte equal ratios of the loss.
        has_effects=is_deciding or metric.name != "bits_per_byte",
    )


def _at_equal_budgets(metric: Metric, budgets: Mapping[str, float], step_s: Value) -> Iterator[Quantity]:
    """Yields two quantities: the metric when a run has spent the FLOP budget, and when it has spent the time budget."""

    def after(budget: str, cost_of_step: Value) -> Value:
        def value(entry: Entry) -> float | None:
            cost = cost_of_step(entry)
            return value_at(entry, budgets[budget] / cost, metric) if budget in budgets and cost else None

        return value

    for budget, label, cost_of_step in (("flops", "FLOPs", _step_flops), ("seconds", "time", step_s)):
        yield Quantity(
            key=f"{metric.name}_at_{budget}",
            label=f"{metric.label} at equal {label}",
            show="number",
            better=metric.better,
            value=after(budget, cost_of_step),
        )


def _to_target(metric: Metric, target: float | None, step_s: Value) -> Iterator[Quantity]:
    """Yields quantities for the steps, items, FLOPs, time and energy that a run spends until it reaches the target."""
    goal = "" if target is None else f" to {metric.label} {target:.4f}"

    def steps(entry: Entry) -> float | None:
        return None if target is None else steps_to(entry, target, metric)

    def spent(cost_of_step: Value) -> Value:
        def value(entry: Entry) -> float | None:
            num_steps, cost = steps(entry), cost_of_step(entry)
            return None if num_steps is None or cost is None else num_steps * cost

        return value

    yield Quantity(key="steps_to_target", label=f"steps{goal}", show="count", value=steps)
    # For runs with the same batch size, ratios of items equal ratios of steps.
    yield Quantity(
        key="items_to_target", label=f"items{goal}", show="count", value=spent(_items_per_step), has_effects=False
    )
    yield Quantity(key="flops_to_target", label=f"FLOPs{goal}", show="count", value=spent(_step_flops))
    yield Quantity(
        key="seconds_to_target", label=f"time{goal}", show="duration", value=spent(step_s), timed="steps", has_effects=False
    )  # fmt: skip
    yield Quantity(key="joules_to_target", label=f"energy{goal}", show="energy", value=spent(_step_joules))


def _step_flops(entry: Entry) -> float | None:
    return entry.step_flops


def _items_per_step(entry: Entry) -> float | None:
    return entry.items_per_step


def _step_joules(entry: Entry) -> float | None:
    return None if entry.energy_j is None or not entry.steps else entry.energy_j / entry.steps


def _gap(entry: Entry) -> float | None:
    # The gap is a ratio and not a difference, because comparisons are of ratios.
    return None if entry.loss is None or not entry.train_loss else entry.loss / entry.train_loss


_MEMORY = (
    Quantity(
        key="peak_bytes",
        label="peak memory",
        show="memory",
        depends_on_seed=False,
        value=_of_done(lambda entry: entry.peak_bytes),
        predicted=lambda entry: entry.predicted.get("peak_bytes"),
    ),
    Quantity(
        key="optimizer_bytes",
        label="optimizer state",
        show="memory",
        depends_on_seed=False,
        value=_of_done(lambda entry: entry.measured.get("optimizer_bytes")),
        predicted=lambda entry: entry.predicted.get("optimizer_bytes"),
    ),
    Quantity(
        key="wire_bytes",
        label="payload of a step's collectives",
        show="memory",
        depends_on_seed=False,
        value=_of_done(lambda entry: entry.measured.get("wire_bytes") or None),
        predicted=lambda entry: entry.predicted.get("wire_bytes"),
    ),
)
_GAP = Quantity(key="gap", label="held-out / training loss", show="number", value=_of_done(_gap))
