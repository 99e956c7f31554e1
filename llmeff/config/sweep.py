"""SweepConfig: the arms, axes, tuning budget and seeds of a study, and the configs of its runs."""

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
    "seed": "the sweep takes it from `seeds`",
    "name": "the sweep uses the arm's name",
    "evaluation.split": "trials use tuning.split, and final runs use base.evaluation.split",
}
"""Fields that a sweep sets itself, and how."""
BASELINE_SEED, AA_SEED = 10_000, 20_000
"""First seed of the baseline's extra runs, and of the A/A arm, if only the number of their seeds is given.

Both are far above the seeds that studies usually count from, so that seeds can be added to a study later.
"""


class Span(Config):
    """A range of positive numbers to search, on a logarithmic scale."""

    low: Positive
    """The lowest number."""
    high: Positive
    """The highest number."""

    @model_validator(mode="after")
    def _rises(self) -> "Span":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}, but low must be smaller than high")
        return self


def _kind(value: Any) -> str:
    return "span" if isinstance(value, Mapping | Span) else "values"


Search = Annotated[Annotated[Span, Tag("span")] | Annotated[tuple[Any, ...], Tag("values")], Discriminator(_kind)]
"""The values to try for a field: a span or a list."""


class ArmConfig(Config):
    """One arm of a study: its settings, and how they are tuned."""

    settings: tuple[Text, ...] = ()
    """Settings in which the arm differs from `base`, in the form of `--set` ("optim=muon")."""
    search: dict[Text, Search] = Field(default_factory=dict)
    """Fields to tune, with the values to try for each."""
    tuned_as: Text | None = None
    """Name of another arm, whose tuned settings this arm reuses. Use it if the arms differ only in something that does
    not change the best settings, such as precision. None if the arm reuses none."""
    factors: dict[Text, Text] = Field(default_factory=dict)
    """The level of each factor, by factor, in a factorial study. Empty in other studies."""


class TuningConfig(Config):
    """The tuning budget, the same for every arm."""

    trials: Count = 5
    """Number of trials of each arm in each cell."""
    seed: Integer = 1000
    """Seed of all trials. Final runs must have other seeds."""
    steps: Count | None = None
    """Steps of a trial. None: as many as a final run. Shorter trials are cheaper, but may choose settings that are best
    only early in training."""
    split: Literal["search", "validation"] = "search"
    """Split that trials are judged on. Final runs must be judged on another split."""


class SweepConfig(Config):
    """A study that compares arms: each is tuned with the same budget, and then run with fresh seeds."""

    renamed: ClassVar[Mapping[str, str]] = {"items": "budget"}

    name: Text = "sweep"
    """Name of the study, and of its folder if no folder is given."""
    base: RunConfig = RunConfig()
    """Config that all runs start from."""
    arms: dict[Text, ArmConfig]
    """The arms to compare, by name."""
    baseline: Text
    """Name of the arm that the others are compared with."""
    axes: dict[Text, tuple[Any, ...]] = Field(default_factory=dict)
    """Fields with lists of values. Each combination of values is a cell. Arms are tuned and compared in each cell."""
    budget: Count | None = None
    """Tokens (or pixels) that each run trains on. They determine its number of steps. None: `train.steps` applies."""
    tuning: TuningConfig = TuningConfig()
    """The tuning budget, the same for all arms."""
    seeds: tuple[Integer, ...] = (0, 1, 2)
    """Seeds of the final runs. Each arm is run once with each seed."""
    baseline_seeds: Count | tuple[Integer, ...] = ()
    """Extra seeds of the baseline, or their number. Every arm is compared with the baseline, so these runs improve all
    comparisons."""
    aa_seeds: Count | tuple[Integer, ...] = ()
    """Seeds of an A/A arm, or their number. This arm repeats the baseline's settings with seeds that no other run has.
    It shows how far two equal arms differ by chance."""
    metric: Text = "loss"
    """The metric of the task that chooses trials and compares arms."""
    target: Positive | None = None
    """Value of the metric for "steps to target", "time to target" and similar quantities. None: the best value that
    every run of the baseline reaches."""

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
                f"tuning.split and base.evaluation.split are both {self.tuning.split!r}. Choose different splits: "
                "final runs must not be judged on the data that chose their settings"
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
        """Yields errors about too few arms, or a baseline or a metric that does not exist."""
        if len(self.arms) < 2:
            yield f"a sweep needs at least two arms. Given: {', '.join(self.arms) or 'none'}"
        if self.baseline not in self.arms:
            yield f"baseline is {self.baseline!r}, which is not an arm. Arms: {', '.join(self.arms)}"
        task = self.base.task
        if self.metric not in task.metric_directions:
            yield (
                f"metric is {self.metric!r}: task {task.name!r} has no such metric."
                f"{nearest(self.metric, task.metric_directions)}"
            )

    def _axis_problems(self) -> Iterator[str]:
        """Yields errors about axes that have no value, or that list a value twice."""
        for key, values in self.axes.items():
            if not values:
                yield "axes: each axis needs at least one value"
            if len({_toml(value) for value in values}) < len(values):
                yield f"axes.{key} lists a value twice: {', '.join(map(_toml, values))}"

    def _seed_problems(self) -> Iterator[str]:
        """Yields errors about missing or repeated seeds, and about an arm with the name of the A/A arm."""
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            yield f"seeds must list at least one seed, and no seed twice. Given: {list(self.seeds)}"
        if self.aa_name in self.arms:
            yield f"arms contains {self.aa_name!r}, but this name is reserved for the A/A arm that aa_seeds adds"
        baseline_seeds, aa_seeds = _counted(self.baseline_seeds, BASELINE_SEED), _counted(self.aa_seeds, AA_SEED)
        yield from _repeated_seeds("baseline_seeds", baseline_seeds, self.seeds)
        yield from _repeated_seeds("aa_seeds", aa_seeds, (*self.seeds, *baseline_seeds))
        every = [*self.seeds, *baseline_seeds, *aa_seeds]
        if self.tuning.seed in every and self._is_tuned:
            yield (
                f"tuning.seed is {self.tuning.seed}, which is also a seed of a final run: {every}. "
                "Trials and final runs need different seeds"
            )

    def _budget_problems(self) -> Iterator[str]:
        """Yields an error if trials of `tuning.steps` steps train on a different number of items in different arms."""
        steps = self.tuning.steps
        for cell in self.cells() if steps is not None else ():
            items = {
                name: items_per_step(self.run_config(name, cell, self.first_trial(name), 0)) * (steps or 0)
                for name, arm in self.arms.items() if arm.search
            }  # fmt: skip
            if len(set(items.values())) > 1:
                shown = ", ".join(f"{name} {count}" for name, count in items.items())
                yield (
                    f"tuning.steps is {steps}, but then the arms' trials have different numbers of items: {shown}. "
                    "Leave tuning.steps out, or give the arms equal batches"
                )
                return

    def _field_problems(self) -> Iterator[str]:
        """Yields errors about fields that are set twice, or that only the sweep itself may set."""
        tables: dict[str, Mapping[str, Any]] = {"axes": self.axes}
        tables |= {f"arms.{name}.search": arm.search for name, arm in self.arms.items()}
        for where, fields in tables.items():
            for key in fields:
                if key in _OWN:
                    yield f"{where} sets {key}, which is not allowed: {_OWN[key]}"
                if key == "train.steps" and self.budget is not None:
                    yield f"{where} sets train.steps, but budget also determines the steps: remove one of them"
                if where != "axes" and key in self.axes:
                    yield f"{where} sets {key}, which is also an axis: remove one of them"

    def _search_problems(self) -> Iterator[str]:
        """Yields errors about an empty search, a wrong `tuned_as`, or a search whose size is not `tuning.trials`."""
        for name, arm in self.arms.items():
            for key, tried in arm.search.items():
                if tried == ():
                    yield f"arms.{name}.search.{key} is empty: give at least one value"
            if arm.tuned_as is not None:
                yield from self._borrowed_problems(name, arm)
            num_combinations = _num_combinations(arm.search)
            if num_combinations not in (None, self.tuning.trials):
                yield (
                    f"arms.{name}.search has {num_combinations} combinations, but tuning.trials is "
                    f"{self.tuning.trials}. They must be equal, because all arms must have the same tuning budget"
                )

    def _borrowed_problems(self, name: str, arm: ArmConfig) -> Iterator[str]:
        if arm.search:
            yield f"arms.{name} has both search and tuned_as = {arm.tuned_as!r}: remove one of them"
        elif arm.tuned_as not in self.arms:
            yield (
                f"arms.{name}.tuned_as is {arm.tuned_as!r}, which is not an arm."
                f"{nearest(arm.tuned_as or '', self.arms)}"
            )
        elif not self.arms[arm.tuned_as].search:
            yield f"arms.{name}.tuned_as is {arm.tuned_as!r}, but that arm has no search. Name an arm with one"

    @property
    def aa_name(self) -> str:
        """Name of the A/A arm, if there is one."""
        return f"{self.baseline} (A/A)"

    @property
    def every_arm(self) -> dict[str, ArmConfig]:
        """All arms by name, including the A/A arm if `aa_seeds` is given."""
        if not self.aa_seeds or self.baseline not in self.arms:
            return self.arms
        same = self.arms[self.baseline]
        tuned_as = same.tuned_as or (self.baseline if same.search else None)
        return self.arms | {self.aa_name: same.model_copy(update={"search": {}, "tuned_as": tuned_as})}

    def repeats(self, arm: str) -> str | None:
        """Returns the baseline's name if `arm` is the A/A arm, which repeats the baseline. Otherwise, returns None."""
        return self.baseline if arm not in self.arms else None

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Returns the seeds of an arm's final runs."""
        if self.repeats(arm):
            return _counted(self.aa_seeds, AA_SEED)
        further = _counted(self.baseline_seeds, BASELINE_SEED) if arm == self.baseline else ()
        return (*self.seeds, *further)

    def has_all_runs_of(self, other: "SweepConfig") -> bool:
        """Returns whether this sweep has every arm of another sweep, with all of that arm's seeds."""
        return all(
            arm in self.every_arm and set(other.seeds_of(arm)) <= set(self.seeds_of(arm)) for arm in other.every_arm
        )

    def tuned_by(self, arm: str) -> str:
        """Returns the name of the arm whose trials choose an arm's settings: its `tuned_as`, or else the arm itself."""
        return self.every_arm[arm].tuned_as or arm

    def cells(self) -> list[dict[str, Any]]:
        """Returns all combinations of the axes' values. Without axes, there is one empty cell."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def trials(self, arm: str) -> list[dict[str, Any]]:
        """Returns the settings of each trial of an arm. The list is empty if the arm has no search.

        If all searched fields have lists, the trials are all combinations of their values. If any field has a span, the
        trials are `tuning.trials` points of a lattice. For the first field, the points are the middles of equal parts
        of its span, on a logarithmic scale. For further fields, they follow the additive recurrence of Roberts (2018).
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
        """Returns the settings of the first trial that tunes the arm, as an example. Empty if the arm is not tuned."""
        tuner = self.tuned_by(arm)
        trials = self.trials(tuner) if tuner in self.arms else []
        return trials[0] if trials else {}

    def run_config(
        self, arm: str, cell: Mapping[str, Any], trial: Mapping[str, Any], seed: int, **more: Any
    ) -> RunConfig:
        """Returns the config of one run.

        Args:
            arm: name of the arm.
            cell: value of each axis.
            trial: tuned settings of the arm.
            seed: seed of the run.
            **more: further fields to set. If `train.steps` is among them, it applies instead of `budget`.

        Raises:
            ConfigError: if the config is not valid.
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
    """Returns the given seeds or, if `seeds` is a number, that many consecutive seeds from `first` on."""
    return seeds if isinstance(seeds, tuple) else tuple(range(first, first + seeds))


def _repeated_seeds(key: str, seeds: tuple[int, ...], others: tuple[int, ...]) -> Iterator[str]:
    """Yields an error if a seed is given twice or is also one of `others`."""
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1 or seed in others})
    if repeated:
        yield f"{key} must differ from one another and from the baseline's other seeds. Repeated: {repeated}"


def _num_combinations(search: Mapping[str, Search]) -> int | None:
    """Returns the number of combinations of a search's lists, or None if the search is empty or includes a span."""
    sizes = [len(tried) for tried in search.values() if isinstance(tried, tuple)]
    return math.prod(sizes) if sizes and len(sizes) == len(search) else None


def _errors_of(sweep: SweepConfig) -> Iterator[str]:
    """Yields the errors in the configs of the arms. If several configs of an arm have an error, yields it once."""
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
    """Yields the jobs whose configs to check for an arm in a cell.

    These are the arm's trials or, if the arm has no trials of its own, one final run.
    """
    trials = sweep.trials(arm)
    for trial in trials:
        yield Job(arm=arm, cell=cell, phase="tuning", number=sweep.tuning.seed, trial=trial, order=0)
    if not trials or sweep.arms[arm].tuned_as is not None:
        yield Job(arm=arm, cell=cell, phase="final", number=0, trial=sweep.first_trial(arm), order=0)


def job_config(sweep: SweepConfig, job: "Job") -> RunConfig:
    """Returns the config of a job's run. Trials are evaluated on `tuning.split` and write no sample.

    Raises:
        ConfigError: if the config is not valid.
    """
    more: dict[str, Any] = {}
    if job.phase == "tuning":
        more = {"evaluation.split": sweep.tuning.split, "evaluation.sample_tokens": 0}
        if sweep.tuning.steps is not None:
            more["train.steps"] = sweep.tuning.steps
    seed = sweep.tuning.seed if job.phase == "tuning" else job.number
    return sweep.run_config(job.arm, job.cell, job.trial, seed, **more)


def items_per_step(config: RunConfig) -> int:
    """Returns the number of tokens (or pixels) that an optimizer step trains on."""
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
    """Formats a value as text that `--set` parses back to the value."""
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
    """One run of a sweep: a trial or a final run."""

    arm: str
    """Name of the arm."""
    cell: dict[str, Any]
    """Value of each axis."""
    phase: str
    """`tuning` for a trial, `final` for a final run."""
    number: int
    """Number of the trial, or seed of the final run."""
    trial: dict[str, Any]
    """Tuned settings: those that the trial tries, or those that were chosen for the final run."""
    order: int
    """Position of the run in the sweep."""

    @property
    def path(self) -> str:
        """Path of the run's folder, relative to the folder of all runs."""
        what = f"trial-{self.number:02d}" if self.phase == "tuning" else f"seed-{self.number}"
        return f"{arm_path(self.arm, self.cell)}/{what}"


def arm_path(arm: str, cell: Mapping[str, Any]) -> str:
    """Returns the path of the folder with an arm's runs in a cell, relative to the folder of all runs."""
    where = [safe_name(",".join(f"{key}={value}" for key, value in cell.items()))] if cell else []
    return "/".join([*where, safe_name(arm)])
