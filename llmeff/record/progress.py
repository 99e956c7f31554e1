"""Display of a run's progress and summary: a bar in a terminal, plain lines in other outputs, or nothing."""

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmeff.core import log
from llmeff.core.units import show_bytes, show_count, show_quantity, show_seconds
from llmeff.record.schema import Result, StepRow

_BAR_EVERY_S = 0.25
_LINES_EVERY_S = 10.0
_BAR_CELLS = 24
NONE: Mapping[str, Path] = MappingProxyType({})
"""An empty mapping: the run made no pictures."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Facts about a run that a display needs in addition to the rows of its steps."""

    total_steps: int
    """The run's last step."""
    item: str
    """Name of an item, which the loss is a mean over, in the singular (`token`)."""
    model_flops_per_item: float
    """FLOPs per item for the MFU: contractions of the model in forward and backward, without recomputation."""
    peak_flops_per_s: float | None
    """The device's peak FLOP/s at this precision. None if unknown; no MFU is shown then."""
    memory_bytes: Callable[[], int]
    """Returns the memory in use, in bytes. Called each time a line is drawn."""


class Display(ABC):
    """Base of displays, which show the progress and the summary of a run."""

    @abstractmethod
    def step(self, row: StepRow) -> None:
        """Shows a step. May skip it to limit how often the display is drawn."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Shows a line of its own, such as the result of an evaluation."""

    @abstractmethod
    def close(self) -> None:
        """Ends the display of steps."""

    @abstractmethod
    def summary(self, result: Result, folder: Path, pictures: Mapping[str, Path] = NONE) -> None:
        """Shows the summary: the result, the run's folder, and the paths of pictures by their captions."""


def open_display(shown: Shown, *, is_silent: bool, console: Console | None = None) -> Display:
    """Returns the display for this output: `Silent`, `Bar` in a terminal, otherwise `Lines`.

    Args:
        shown: facts about the run.
        is_silent: show nothing (for `--quiet`, `--json`, and all ranks except the main one).
        console: the output. None means standard output.
    """
    if is_silent:
        return Silent()
    console = console or Console(file=log.out())
    return Bar(shown, console) if console.is_terminal and not console.is_dumb_terminal else Lines(shown, console)


class Silent(Display):
    """Display that shows nothing."""

    def step(self, row: StepRow) -> None:
        """Ignores the step, because this display shows nothing."""

    def note(self, text: str) -> None:
        """Ignores the text, because this display shows nothing."""

    def close(self) -> None:
        """Does nothing, because this display shows nothing."""

    def summary(self, result: Result, folder: Path, pictures: Mapping[str, Path] = NONE) -> None:
        """Ignores the summary, because this display shows nothing."""


class _Visible(Display):
    """Base of displays that draw the first and the last step, and other steps at most once in `every_s` seconds."""

    every_s: float

    def __init__(self, shown: Shown, console: Console):
        self._shown = shown
        self._console = console
        self._start_s = self._drawn_s = time.perf_counter()
        self._first_step: int | None = None
        self._items_per_s: float | None = None

    def step(self, row: StepRow) -> None:
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._start_s = row.step, now
        if not row.is_warmup:
            before = row.items_per_s if self._items_per_s is None else self._items_per_s
            self._items_per_s = 0.9 * before + 0.1 * row.items_per_s
        is_end = row.step in (self._first_step, self._shown.total_steps)
        if is_end or now - self._drawn_s >= self.every_s:
            self._drawn_s = now
            self._draw(row.step, self._parts(row, now))

    @abstractmethod
    def _draw(self, step: int, parts: list[str]) -> None: ...

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        """Does nothing, because each line is complete when it is printed."""

    def summary(self, result: Result, folder: Path, pictures: Mapping[str, Path] = NONE) -> None:
        self.close()
        show_summary(self._console, result, folder, pictures)

    def _parts(self, row: StepRow, now: float) -> list[str]:
        speed = row.items_per_s if self._items_per_s is None else self._items_per_s
        parts = [f"loss {row.loss:.4f}", f"{show_count(speed)} {self._shown.item}s/s"]
        if self._shown.peak_flops_per_s is not None:
            parts.append(f"MFU {speed * self._shown.model_flops_per_item / self._shown.peak_flops_per_s:.1%}")
        parts.append(show_bytes(self._shown.memory_bytes()))
        done = row.step - (self._first_step or 0)
        if done:
            parts.append(f"{show_seconds((now - self._start_s) / done * (self._shown.total_steps - row.step))} left")
        return parts


class Lines(_Visible):
    """Prints plain lines at intervals, for files and pipes."""

    every_s = _LINES_EVERY_S

    def _draw(self, step: int, parts: list[str]) -> None:
        self._console.print(Text(", ".join([f"step {step}/{self._shown.total_steps}", *parts])), soft_wrap=True)


class Bar(_Visible):
    """A progress bar that redraws one line. It has no refresh thread, which would take time from the steps."""

    every_s = _BAR_EVERY_S
    _is_drawn = False

    def _draw(self, step: int, parts: list[str]) -> None:
        done, left = "#-" if self._console.options.ascii_only else "━─"
        full = round(_BAR_CELLS * step / self._shown.total_steps)
        line = Text.assemble(
            (done * full, "green"), (left * (_BAR_CELLS - full), "bright_black"),
            (f" {step}/{self._shown.total_steps} ", "bold"), "  ".join(parts),
        )  # fmt: skip
        line.truncate(self._console.width - 1, pad=True)
        self._console.print(line, end="\r", no_wrap=True)
        self._is_drawn = True

    def note(self, text: str) -> None:
        """Replaces the bar by a line of text. The next drawn step puts the bar below that line."""
        self._console.print(Text(text.ljust(self._console.width - 1)))

    def close(self) -> None:
        """Ends the bar's line, so that the bar stays as it was last drawn."""
        if self._is_drawn:
            self._console.print()
        self._is_drawn = False


def show_summary(console: Console, result: Result, folder: Path, pictures: Mapping[str, Path] = NONE) -> None:
    """Prints the summary of a run: predicted and measured costs, losses and metrics, and the paths of its files."""
    if result.status == "diverged":
        console.print(Text(f"The run diverged after step {result.steps}. {result.diagnosis}", "bold red"))
    table = Table(
        "",
        "predicted" if result.prediction == "law" else "predicted (traced)",
        "measured",
        "error",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for quantity in [
        *result.predicted,
        *(name for name in result.measured if name not in result.predicted),
    ]:
        cells = [values.get(quantity) for values in (result.predicted, result.measured)]
        error = result.error.get(quantity)
        table.add_row(
            quantity.replace("_", " "),
            *("-" if value is None else show_quantity(quantity, value) for value in cells),
            "-" if error is None else f"{error:+.2%}",
        )
    console.print(table)
    for name, value in _facts(result):
        console.print(Text.assemble((f"{name:<12} ", "bright_black"), value), soft_wrap=True)
    if result.sample:
        console.print(Text("sample", "bright_black"))
        console.print(Text(_printable(result.sample)), soft_wrap=True)
    for name, path in [("run", folder), *pictures.items()]:
        console.print(Text.assemble((f"{name:<12} ", "bright_black"), str(path)), soft_wrap=True)
    console.print(
        Text.assemble(("look further", "bright_black"), f" llmeff compare {shlex.quote(str(folder))}"), soft_wrap=True
    )


def _facts(result: Result) -> list[tuple[str, str]]:
    facts = [("training", f"{result.train_loss:.4f} nats per {result.item} (mean of the last steps)")]
    for split, metrics in result.metrics.items():
        named = result.metric_directions or metrics
        shown = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items() if name in named)
        facts.append((split, ", ".join(shown)))
    if result.references:
        references = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.references.items())
        facts.append(("reference", ", ".join(references)))
    if result.items_per_s is not None:
        spread = result.items_per_s
        speed = f"{show_count(spread.median)} {result.item}s/s (half of the steps lie between "
        speed += f"{show_count(spread.lower)} and {show_count(spread.upper)})"
        facts.append(("speed", speed + ("" if result.mfu is None else f", MFU {result.mfu:.1%}")))
    timings = {name.removesuffix("_s"): seconds for name, seconds in result.timings.model_dump().items()}
    facts.append(("time", ", ".join(f"{name} {show_seconds(s)}" for name, s in timings.items())))
    if result.kernels:
        facts.append(("kernels", ", ".join(result.kernels)))
    if result.energy_j is not None:
        facts.append(("energy", show_count(result.energy_j, "J")))
    return facts


def _printable(text: str) -> str:
    """Replaces control characters, because a model may generate sequences that would control the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
