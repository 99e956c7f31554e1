"""SweepConfig: what is compared, over what, with how much tuning; and the runs that it comes to."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from llmeff.core.config import Config, ConfigError, Count, Integer, Positive, Text, override, validate
from llmeff.core.registry import nearest
from llmeff.runconfig import RunConfig

_SAFE = re.compile(r"[^A-Za-z0-9.+=-]+")


class Span(Config):
    """Numbers between two, spread evenly over their logarithms."""

    low: Positive
    """The least."""
    high: Positive
    """The most."""

    @model_validator(mode="after")
    def _rises(self) -> "Span":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, and high {self.high}: give the smaller first")
        return self


def _kind(value: Any) -> str:
    return "span" if isinstance(value, Mapping | Span) else "values"


Search = Annotated[Annotated[Span, Tag("span")] | Annotated[tuple[Any, ...], Tag("values")], Discriminator(_kind)]
"""What is tried of a field: a span, or a list of values."""


class ArmConfig(Config):
    """One of the things that are compared."""

    settings: tuple[Text, ...] = ()
    """What sets it apart from the base, as `--set` takes it."""
    search: dict[Text, Search] = Field(default_factory=dict)
    """What is tuned of it: fields, and what is tried of each."""
    tuned_as: Text | None = None
    """Another arm, whose trials choose for this one too: for arms that differ in what leaves the best settings alone."""
    factors: dict[Text, Text] = Field(default_factory=dict)
    """The levels that make it, where arms are combinations of factors."""


class TuningConfig(Config):
    """The budget that every arm has to be tuned with."""

    trials: Count = 5
    """Runs of each arm and cell."""
    seed: Integer = 1000
    """Of all of them; final runs have others."""
    steps: Count | None = None
    """Of a trial; None: as many as a final run. Shorter trials are cheaper, and may choose what is best early."""


class SweepConfig(Config):
    """A study: arms that are tuned with one budget, and then run with fresh seeds."""

    name: Text = "sweep"
    """Names the study, and its folder where none is given."""
    base: RunConfig = RunConfig()
    """What all runs have in common."""
    arms: dict[Text, ArmConfig]
    """By name."""
    baseline: Text
    """The arm that the others are set beside."""
    axes: dict[Text, tuple[Any, ...]] = Field(default_factory=dict)
    """Fields whose values are gone through, all with all; arms are compared, and tuned, under the same values."""
    items: Count | None = None
    """Tokens (or pixels) that each run trains on, from which its steps follow; None: `train.steps` of its config."""
    tuning: TuningConfig = TuningConfig()
    """The same for all arms."""
    seeds: tuple[Integer, ...] = (0, 1, 2)
    """Of the final runs: each arm is run with each."""
    target: Positive | None = None
    """The loss to which steps, items, FLOPs and time are counted; None: the lowest that every run of the
    baseline reaches."""

    @model_validator(mode="after")
    def _works(self) -> "SweepConfig":
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if len(self.arms) < 2:
            yield f"a sweep compares arms, given: {', '.join(self.arms) or 'none'}"
        if self.baseline not in self.arms:
            yield f"baseline is {self.baseline!r}, the arms are: {', '.join(self.arms)}"
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            yield f"seeds must be different and at least one, given: {list(self.seeds)}"
        if self.tuning.seed in self.seeds and any(arm.search for arm in self.arms.values()):
            yield f"tuning.seed {self.tuning.seed} is among the seeds {list(self.seeds)}: final runs need fresh ones"
        names = [_safe(name) for name in self.arms]
        if len(set(names)) < len(names):
            yield f"two arms have one folder: {', '.join(names)}"
        if not all(self.axes.values()):
            yield "an axis has no value"
        yield from self._search_problems()
        yield from _errors_of(self)

    def _search_problems(self) -> Iterator[str]:
        for name, arm in self.arms.items():
            for key, tried in arm.search.items():
                if isinstance(tried, tuple) and not tried:
                    yield f"arms.{name}.search.{key}: there is nothing to try"
            if arm.tuned_as is not None:
                yield from self._borrowed_problems(name, arm)
            lists = [tried for tried in arm.search.values() if isinstance(tried, tuple)]
            if len(lists) == len(arm.search) and lists and math.prod(map(len, lists)) != self.tuning.trials:
                yield (
                    f"arms.{name}.search has {math.prod(map(len, lists))} combinations, but every arm has tuning.trials = "
                    f"{self.tuning.trials}: an equal budget is what makes them comparable"
                )

    def _borrowed_problems(self, name: str, arm: ArmConfig) -> Iterator[str]:
        if arm.search:
            yield f"arms.{name} has a search of its own and is tuned as {arm.tuned_as!r}: give one of them"
        elif arm.tuned_as not in self.arms:
            yield f"arms.{name}.tuned_as is {arm.tuned_as!r}.{nearest(arm.tuned_as or '', self.arms)}"
        elif not self.arms[arm.tuned_as].search:
            yield f"arms.{name} is tuned as {arm.tuned_as!r}, which has no search"

    def tuned_by(self, arm: str) -> str:
        """The arm whose trials choose an arm's settings: mostly its own."""
        return self.arms[arm].tuned_as or arm

    def cells(self) -> list[dict[str, Any]]:
        """All values of the axes, with one another."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def trials(self, arm: str) -> list[dict[str, Any]]:
        """What tuning tries of an arm; nothing where it has no search.

        Lists are gone through, all with all. Spans are tried at the points of a lattice: one span at the middles of
        `trials` equal parts of its logarithm, several by the additive recurrence of Roberts (2018).
        """
        search = self.arms[arm].search
        if not search:
            return []
        lists = [tried for tried in search.values() if isinstance(tried, tuple)]
        if len(lists) == len(search):
            return [dict(zip(search, values, strict=True)) for values in itertools.product(*lists)]
        count = self.tuning.trials
        return [
            {
                key: _at(tried, _place(number, axis, count, len(search)))
                for axis, (key, tried) in enumerate(search.items())
            }
            for number in range(count)
        ]

    def first_trial(self, arm: str) -> dict[str, Any]:
        """What is tried first of an arm: stands for what will be chosen."""
        tuner = self.tuned_by(arm)
        trials = self.trials(tuner) if tuner in self.arms else []
        return trials[0] if trials else {}

    def run_config(
        self, arm: str, cell: Mapping[str, Any], trial: Mapping[str, Any], seed: int, **more: Any
    ) -> RunConfig:
        """The config of one run.

        Raises:
            ConfigError: it cannot work.
        """
        settings = [
            *self.arms[arm].settings,
            *(f"{key}={_toml(value)}" for key, value in [*cell.items(), *trial.items()]),
            *(f"{key}={_toml(value)}" for key, value in more.items()),
            f"seed={seed}",
        ]
        config = validate(RunConfig, override(self.base.model_dump(mode="json") | {"name": arm}, settings))
        if self.items is None or "train.steps" in more:
            return config
        steps = max(1, round(self.items / items_per_step(config)))
        return validate(RunConfig, override(config.model_dump(mode="json"), [f"train.steps={steps}"]))


def _errors_of(sweep: SweepConfig) -> Iterator[str]:
    """What of the arms makes no run, each said once."""
    for name in sweep.arms:
        for cell in sweep.cells():
            try:
                sweep.run_config(name, cell, sweep.first_trial(name), sweep.seeds[0] if sweep.seeds else 0)
            except ConfigError as error:
                yield from (f"arms.{name}: {problem}" for problem in error.problems)
                break


def items_per_step(config: RunConfig) -> int:
    """Tokens (or pixels) that an optimizer step trains on."""
    return config.task.items(config.data) * config.train.batch


def _place(number: int, axis: int, count: int, num_axes: int) -> float:
    if axis == 0:
        return (number + 0.5) / count
    root = 2.0
    for _ in range(64):  # the positive root of x^(d + 1) = x + 1
        root = (1 + root) ** (1 / (num_axes + 1))
    return math.fmod(0.5 + (number + 1) * root**-axis, 1.0)


def _at(tried: Span | tuple[Any, ...], place: float) -> Any:
    if isinstance(tried, tuple):
        return tried[int(place * len(tried))]
    value = tried.low * (tried.high / tried.low) ** place
    return float(f"{value:.4g}")


def _toml(value: Any) -> str:
    return "null" if value is None else json.dumps(value)


def _safe(text: str) -> str:
    return _SAFE.sub("-", text).strip("-") or "arm"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    arm: str
    cell: dict[str, Any]
    phase: str
    """`tuning` or `final`."""
    number: int
    """Of the trial, or the seed."""
    trial: dict[str, Any]
    """The settings tried; of a final run, those chosen."""
    order: int
    """Its place in the sweep."""

    @property
    def path(self) -> str:
        """Of its folder, within the sweep's."""
        what = f"trial-{self.number:02d}" if self.phase == "tuning" else f"seed-{self.number}"
        cell = [_safe(",".join(f"{key}={value}" for key, value in self.cell.items()))] if self.cell else []
        return "/".join([*cell, _safe(self.arm), what])
