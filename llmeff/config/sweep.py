"""SweepConfig: what is compared, over what, with how much tuning; and the runs that it comes to."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from llmeff.config.run import RunConfig
from llmeff.core.config import Config, ConfigError, Count, Integer, Positive, Text, override, validate
from llmeff.core.files import safe_name
from llmeff.core.registry import nearest

_OWN = {
    "seed": "`seeds` gives",
    "name": "the arm gives",
    "evaluation.split": "is what trials and final runs differ in",
}
"""Fields that a sweep sets itself."""
BASELINE_SEED, AA_SEED = 10_000, 20_000
"""The first of the baseline's further seeds, and of the A/A arm's, where their number alone is given: far from all that
studies count from, so that a study can grow."""


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
    split: Literal["search", "validation"] = "search"
    """What trials are judged on, which final runs are not."""


class SweepConfig(Config):
    """A study: arms that are tuned with one budget, and then run with fresh seeds."""

    renamed: ClassVar[Mapping[str, str]] = {"items": "budget"}

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
    budget: Count | None = None
    """Tokens (or pixels) that each run trains on, from which its steps follow; None: `train.steps` of its config."""
    tuning: TuningConfig = TuningConfig()
    """The same for all arms."""
    seeds: tuple[Integer, ...] = (0, 1, 2)
    """Of the final runs: each arm is run with each."""
    baseline_seeds: Count | tuple[Integer, ...] = ()
    """Further seeds of the baseline alone, or how many: all arms are set beside it, so that its runs tell the most."""
    aa_seeds: Count | tuple[Integer, ...] = ()
    """Seeds of an A/A arm, or how many: the baseline's settings once more, as an arm of its own with seeds that no other
    run has. It shows how far two arms differ that are the same."""
    metric: Text = "loss"
    """What decides, of the metrics that the task names: which trial is chosen, and what the arms are compared by."""
    target: Positive | None = None
    """The value of the metric to which steps, items, FLOPs and time are counted; None: the best that every run of the
    baseline reaches."""

    @model_validator(mode="after")
    def _works(self) -> "SweepConfig":
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._choice_problems()
        yield from self._seed_problems()
        if self.tuning.split == self.base.evaluation.split and self._is_tuned:
            yield (
                f"tuning.split and base.evaluation.split are both {self.tuning.split!r}: what settings were chosen on "
                "cannot judge them"
            )
        yield from self._axis_problems()
        yield from self._field_problems()
        yield from self._search_problems()
        errors = list(_errors_of(self))
        yield from errors or self._budget_problems()

    @property
    def _is_tuned(self) -> bool:
        """Whether any arm has a search."""
        return any(arm.search for arm in self.arms.values())

    def _choice_problems(self) -> Iterator[str]:
        """Too few arms, and a baseline or a metric that is not there."""
        if len(self.arms) < 2:
            yield f"a sweep compares arms, given: {', '.join(self.arms) or 'none'}"
        if self.baseline not in self.arms:
            yield f"baseline is {self.baseline!r}, the arms are: {', '.join(self.arms)}"
        task = self.base.task
        if self.metric not in task.metric_directions:
            yield f"metric is {self.metric!r}: task {task.name!r} is not judged by it.{nearest(self.metric, task.metric_directions)}"

    def _axis_problems(self) -> Iterator[str]:
        """Axes without values, or with a value twice."""
        for key, values in self.axes.items():
            if not values:
                yield "an axis has no value"
            if len({_toml(value) for value in values}) < len(values):
                yield f"axes.{key} has a value twice: {', '.join(map(_toml, values))}"

    def _seed_problems(self) -> Iterator[str]:
        """Seeds that are given twice, or that trials have."""
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            yield f"give at least one seed, and none twice; given seeds: {list(self.seeds)}"
        if self.aa_name in self.arms:
            yield f"arms has a {self.aa_name!r}, which is what the arm of aa_seeds is called"
        baseline_seeds, aa_seeds = _counted(self.baseline_seeds, BASELINE_SEED), _counted(self.aa_seeds, AA_SEED)
        yield from _repeated_seeds("baseline_seeds", baseline_seeds, self.seeds)
        yield from _repeated_seeds("aa_seeds", aa_seeds, (*self.seeds, *baseline_seeds))
        every = [*self.seeds, *baseline_seeds, *aa_seeds]
        if self.tuning.seed in every and self._is_tuned:
            yield f"tuning.seed {self.tuning.seed} is among the seeds {every}: final runs need fresh ones"

    def _budget_problems(self) -> Iterator[str]:
        """Shorter trials that are not equally short."""
        steps = self.tuning.steps
        for cell in self.cells() if steps is not None else ():
            items = {
                name: items_per_step(self.run_config(name, cell, self.first_trial(name), 0)) * (steps or 0)
                for name, arm in self.arms.items() if arm.search
            }  # fmt: skip
            if len(set(items.values())) > 1:
                shown = ", ".join(f"{name} {count}" for name, count in items.items())
                yield f"tuning.steps = {steps} gives trials of other numbers of items: {shown}"
                return

    def _field_problems(self) -> Iterator[str]:
        """Fields that are the sweep's own to set, or that two parts of it would set."""
        tables: dict[str, Mapping[str, Any]] = {"axes": self.axes}
        tables |= {f"arms.{name}.search": arm.search for name, arm in self.arms.items()}
        for where, fields in tables.items():
            for key in fields:
                if key in _OWN:
                    yield f"{where} sets {key}, which {_OWN[key]}"
                if key == "train.steps" and self.budget is not None:
                    yield f"{where} sets train.steps, which follow from budget: leave one of them out"
                if where != "axes" and key in self.axes:
                    yield f"{where} tries {key}, which is an axis"

    def _search_problems(self) -> Iterator[str]:
        """Searches that try nothing, that are another arm's too, or whose size differs from the budget."""
        for name, arm in self.arms.items():
            for key, tried in arm.search.items():
                if tried == ():
                    yield f"arms.{name}.search.{key}: there is nothing to try"
            if arm.tuned_as is not None:
                yield from self._borrowed_problems(name, arm)
            num_combinations = _num_combinations(arm.search)
            if num_combinations not in (None, self.tuning.trials):
                yield (
                    f"arms.{name}.search has {num_combinations} combinations, but every arm has tuning.trials = "
                    f"{self.tuning.trials}: an equal budget is what makes them comparable"
                )

    def _borrowed_problems(self, name: str, arm: ArmConfig) -> Iterator[str]:
        if arm.search:
            yield f"arms.{name} has a search of its own and is tuned as {arm.tuned_as!r}: give one of them"
        elif arm.tuned_as not in self.arms:
            yield f"arms.{name}.tuned_as is {arm.tuned_as!r}.{nearest(arm.tuned_as or '', self.arms)}"
        elif not self.arms[arm.tuned_as].search:
            yield f"arms.{name} is tuned as {arm.tuned_as!r}, which has no search"

    @property
    def aa_name(self) -> str:
        """What the A/A arm is called, where there is one."""
        return f"{self.baseline} (A/A)"

    @property
    def every_arm(self) -> dict[str, ArmConfig]:
        """The arms that are run: those that are given, and the A/A arm where it has seeds."""
        if not self.aa_seeds or self.baseline not in self.arms:
            return self.arms
        same = self.arms[self.baseline]
        tuned_as = same.tuned_as or (self.baseline if same.search else None)
        return self.arms | {self.aa_name: same.model_copy(update={"search": {}, "tuned_as": tuned_as})}

    def repeats(self, arm: str) -> str | None:
        """The arm whose settings an arm repeats with seeds of its own; None of all but the A/A arm."""
        return self.baseline if arm not in self.arms else None

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds of an arm's final runs."""
        if self.repeats(arm):
            return _counted(self.aa_seeds, AA_SEED)
        further = _counted(self.baseline_seeds, BASELINE_SEED) if arm == self.baseline else ()
        return (*self.seeds, *further)

    def has_all_runs_of(self, other: "SweepConfig") -> bool:
        """Whether every arm of another sweep is here, with all of its seeds."""
        return all(
            arm in self.every_arm and set(other.seeds_of(arm)) <= set(self.seeds_of(arm)) for arm in other.every_arm
        )

    def tuned_by(self, arm: str) -> str:
        """The arm whose trials choose an arm's settings: mostly its own."""
        return self.every_arm[arm].tuned_as or arm

    def cells(self) -> list[dict[str, Any]]:
        """All values of the axes, with one another."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def trials(self, arm: str) -> list[dict[str, Any]]:
        """What tuning tries of an arm; nothing where it has no search.

        Lists are gone through, all with all. Spans are tried at the points of a lattice: one span at the middles of
        `trials` equal parts of its logarithm, several by the additive recurrence of Roberts (2018).
        """
        search = self.every_arm[arm].search
        if not search:
            return []
        lists = [tried for tried in search.values() if isinstance(tried, tuple)]
        if len(lists) == len(search):
            return [dict(zip(search, values, strict=True)) for values in itertools.product(*lists)]
        count = self.tuning.trials
        return [
            {
                key: _at(tried, _lattice_point(number, axis, count, len(search)))
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
            *self.every_arm[arm].settings,
            *(f"{key}={_toml(value)}" for key, value in [*cell.items(), *trial.items()]),
            *(f"{key}={_toml(value)}" for key, value in more.items()),
            f"seed={seed}",
        ]
        config = validate(RunConfig, override(self.base.model_dump(mode="json") | {"name": arm}, settings))
        if self.budget is None or "train.steps" in more:
            return config
        steps = max(1, round(self.budget / items_per_step(config)))
        return validate(RunConfig, override(config.model_dump(mode="json"), [f"train.steps={steps}"]))


def _counted(seeds: int | tuple[int, ...], first: int) -> tuple[int, ...]:
    """Seeds that are given, or so many from the first on."""
    return seeds if isinstance(seeds, tuple) else tuple(range(first, first + seeds))


def _repeated_seeds(key: str, seeds: tuple[int, ...], others: tuple[int, ...]) -> Iterator[str]:
    """The problem of seeds that are given twice, or that other runs have."""
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1 or seed in others})
    if repeated:
        yield f"{key} must be seeds that no other run of the baseline's settings has, given again: {repeated}"


def _num_combinations(search: Mapping[str, Search]) -> int | None:
    """How many settings the lists of a search make; None if there is a span among them, or no search."""
    sizes = [len(tried) for tried in search.values() if isinstance(tried, tuple)]
    return math.prod(sizes) if sizes and len(sizes) == len(search) else None


def _errors_of(sweep: SweepConfig) -> Iterator[str]:
    """Why configs of the arms cannot work; each reason is given once an arm, by its first config."""
    reported = set()
    for name in sweep.arms:
        for job in itertools.chain.from_iterable(_typical_jobs(sweep, name, cell) for cell in sweep.cells()):
            try:
                job_config(sweep, job)
            except ConfigError as error:
                tried = "".join(f", {key} = {_toml(value)}" for key, value in (job.cell | job.trial).items())
                for problem in error.problems:
                    if (name, problem) not in reported:
                        reported.add((name, problem))
                        yield f"arms.{name}{tried}: {problem}"


def _typical_jobs(sweep: SweepConfig, arm: str, cell: dict[str, Any]) -> Iterator["Job"]:
    """All trials of an arm in a cell; a final run if the arm has no trials, or another arm's choose for it."""
    trials = sweep.trials(arm)
    for trial in trials:
        yield Job(arm=arm, cell=cell, phase="tuning", number=sweep.tuning.seed, trial=trial, order=0)
    if not trials or sweep.arms[arm].tuned_as is not None:
        yield Job(arm=arm, cell=cell, phase="final", number=0, trial=sweep.first_trial(arm), order=0)


def job_config(sweep: SweepConfig, job: "Job") -> RunConfig:
    """The run's config. Trials are judged on a split of their own, and keep no samples.

    Raises:
        ConfigError: it cannot work.
    """
    more: dict[str, Any] = {}
    if job.phase == "tuning":
        more = {"evaluation.split": sweep.tuning.split, "evaluation.sample_tokens": 0}
        if sweep.tuning.steps is not None:
            more["train.steps"] = sweep.tuning.steps
    seed = sweep.tuning.seed if job.phase == "tuning" else job.number
    return sweep.run_config(job.arm, job.cell, job.trial, seed, **more)


def items_per_step(config: RunConfig) -> int:
    """Tokens (or pixels) that an optimizer step trains on."""
    return config.task.items(config.data) * config.train.batch


def _lattice_point(number: int, axis: int, count: int, num_axes: int) -> float:
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
    """A value as `--set` reads it."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {_toml(own)}" for key, own in value.items()) + "}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


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
        return f"{arm_path(self.arm, self.cell)}/{what}"


def arm_path(arm: str, cell: Mapping[str, Any]) -> str:
    """Of the folder with an arm's runs in a cell, within that of all runs."""
    where = [safe_name(",".join(f"{key}={value}" for key, value in cell.items()))] if cell else []
    return "/".join([*where, safe_name(arm)])
