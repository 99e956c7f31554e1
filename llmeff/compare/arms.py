"""The arms of one cell of a study, ready for comparison: runs by seed, baseline, kinship and step times."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmeff.compare.alike import in_cell, kin_of
from llmeff.compare.ledger import Entry
from llmeff.compare.timing import StepTimes, times_by_arm
from llmeff.core.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arms:
    """All arms of one cell."""

    cell: dict[str, Any]
    """The value of each axis."""
    runs: dict[str, list[Entry]]
    """The final runs of each arm, sorted by seed. The baseline is the first arm. An arm has no runs if none of its
    trials finished."""
    baseline: str
    """The arm that the other arms are compared with."""
    kin: Mapping[str, Hashable]
    """A key for each arm, equal for arms that are kin (see `kin_of`)."""
    times: Mapping[str, Sequence[float]]
    """Seconds per step, by arm, one value per generation of the timing run. Arms that were not timed are absent."""

    @classmethod
    def of(
        cls, finals: Sequence[Entry], trials: Sequence[Entry], *, baseline: str, step_times: StepTimes | None
    ) -> "Arms":
        """Sorts the runs of a cell by arm and seed.

        Args:
            finals: the final runs of the cell, at least one.
            trials: the tuning trials of the cell.
            baseline: the arm that the other arms are compared with.
            step_times: the step times of the timing run. None if there was no timing run.

        Raises:
            ConfigError: the baseline has no run in this cell, or an arm has two runs with the same seed.
        """
        cell = finals[0].cell
        names = dict.fromkeys(entry.arm for entry in [*finals, *trials])
        if baseline not in names:
            raise ConfigError(f"the baseline {baseline!r} has no run{in_cell(cell)}. Choose another --baseline")
        runs: dict[str, list[Entry]] = {name: [] for name in sorted(names, key=lambda name: name != baseline)}
        for entry in sorted(finals, key=lambda entry: entry.seed):
            if any(run.seed == entry.seed for run in runs[entry.arm]):
                twice = ", ".join(run.name for run in finals if (run.arm, run.seed) == (entry.arm, entry.seed))
                raise ConfigError(
                    f"{entry.arm}{in_cell(entry.cell)} has two runs with seed {entry.seed}: {twice}. Leave one out"
                )
            runs[entry.arm].append(entry)
        times = times_by_arm(step_times, runs, cell)
        return cls(cell=cell, runs=runs, baseline=baseline, kin=kin_of(runs), times=times)

    @property
    def aa_arm(self) -> str | None:
        """The A/A arm, which repeats the baseline with other seeds. None if the cell has no A/A arm."""
        repeating = (name for name, runs in self.runs.items() if any(run.repeats == self.baseline for run in runs))
        return next(repeating, None)

    @property
    def are_all_timed(self) -> bool:
        """Whether every arm has step times."""
        return self.runs.keys() <= self.times.keys()

    def is_kin(self, name: str) -> bool:
        """Whether an arm is kin to the baseline, so that its runs are paired with the baseline's by seed."""
        return self.kin[name] == self.kin[self.baseline]
