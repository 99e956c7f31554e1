import io
from pathlib import Path

import pytest
from rich.console import Console

from llmeff.record import progress
from llmeff.record.progress import Bar, Display, Lines, Shown, Silent, open_display, show_summary

SHOWN = Shown(
    total_steps=1000,
    item="token",
    model_flops_per_item=2e9,
    peak_flops_per_s=1e12,
    memory_bytes=lambda: 3 * 2**30,
)


@pytest.fixture
def now(monkeypatch):
    """A clock that stands until it is moved."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: time[0])
    return time


def _console(*, is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100, legacy_windows=False)


def test_a_pipe_gets_a_plain_line_now_and_then(now, step_row):
    console = _console(is_terminal=False)
    display = open_display(SHOWN, is_silent=False, console=console)
    assert isinstance(display, Lines)
    for step in range(1, 1001):
        display.step(step_row(step, items_per_s=250.0))
        now[0] += 0.125
    display.note("validation loss 2.0")
    display.close()

    lines = console.file.getvalue().splitlines()
    assert len(lines) == 15  # the first, one in 10 s of 125, the last, and the note
    assert lines[0] == "step 1/1000, loss 4.0000, 250 tokens/s, MFU 50.0%, 3.00 GiB"
    assert lines[6] == "step 481/1000, loss 0.0083, 250 tokens/s, MFU 50.0%, 3.00 GiB, 1m 05s left"
    assert lines[-1] == "validation loss 2.0"
    assert "\x1b" not in console.file.getvalue()


def test_a_terminal_gets_one_line_drawn_over_itself(now, step_row):
    console = _console(is_terminal=True)
    display = open_display(SHOWN, is_silent=False, console=console)
    assert isinstance(display, Bar)
    for step in range(1, 11):
        display.step(step_row(step))
        now[0] += 0.125
    display.close()
    text = console.file.getvalue()
    assert text.count("\r") == 5  # steps 1, 3, 5, 7, 9: four a second
    assert text.count("\n") == 1


def test_the_speed_that_is_shown_is_that_of_about_ten_steps_after_warm_up(now, step_row):
    console = _console(is_terminal=False)
    display = Lines(SHOWN, console)
    speeds = [(900.0, True), (100.0, False), (300.0, False), (220.0, False)]
    for step, (speed, is_warmup) in enumerate(speeds, start=1):
        display.step(step_row(step, items_per_s=speed, is_warmup=is_warmup))
        now[0] += 10.0
    shown = [line.split(", ")[2] for line in console.file.getvalue().splitlines()]
    assert shown == ["900 tokens/s", "100 tokens/s", "120 tokens/s", "130 tokens/s"]  # 0.9 of before, 0.1 of the step


@pytest.mark.parametrize(("step", "full"), [(1, 2), (5, 12), (10, 24)])
def test_a_bar_is_full_at_the_end(now, step_row, step, full):
    console = _console(is_terminal=True)
    ten = Shown(total_steps=10, item="token", model_flops_per_item=1.0, peak_flops_per_s=None, memory_bytes=lambda: 0)
    Bar(ten, console).step(step_row(step))
    assert (console.file.getvalue().count("━"), console.file.getvalue().count("─")) == (full, 24 - full)


def test_a_device_nobody_knows_has_no_mfu(now, step_row):
    console = _console(is_terminal=False)
    unknown = Shown(
        total_steps=10, item="pixel", model_flops_per_item=1.0, peak_flops_per_s=None, memory_bytes=lambda: 0
    )
    open_display(unknown, is_silent=False, console=console).step(step_row(1))
    assert "MFU" not in console.file.getvalue()
    assert "pixels/s" in console.file.getvalue()


def test_silence(capsys, step_row, result):
    display = open_display(SHOWN, is_silent=True)
    assert isinstance(display, Silent)
    display.step(step_row(1))
    display.note("nothing")
    display.summary(result, Path("run"))
    display.close()
    assert capsys.readouterr() == ("", "")


def test_the_summary_sets_prediction_beside_measurement(result):
    console = _console(is_terminal=False)
    show_summary(console, result, Path("my run"), {"loss curve": Path("my run/loss.png")})
    text = console.file.getvalue()
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in text.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    assert cells == {
        "parameters": ["1,000", "1,000", "+0.00%"],
        "peak bytes": ["95.00 MiB", "100.00 MiB", "-5.00%"],
        "wire bytes": ["0 B", "-", "-"],
        "resident bytes": ["-", "256.00 MiB", "-"],
    }
    assert "def f():\n    pass" in text
    assert "gzip bits per byte 1.8940" in text
    assert text.rstrip().endswith("llmeff compare 'my run'")


def _below_the_table(result, folder=Path("my run"), **pictures):
    console = _console(is_terminal=False)
    show_summary(console, result, folder, pictures)
    lines = console.file.getvalue().splitlines()
    return lines[max(n for n, line in enumerate(lines) if line.startswith("└")) + 1 :]


def test_below_it_stands_all_that_is_known_of_the_run(result):
    known = {"kernels": ("attention: flex", "scan: torch"), "energy_j": 12500.0, "mfu": 0.25}
    assert _below_the_table(result.model_copy(update=known), loss=Path("my run/loss.png")) == [
        "training     2.0833 nats per token (mean of the last steps)",
        "validation   loss 2.5000, bits per byte 1.7500, accuracy 0.4000",
        "reference    gzip bits per byte 1.8940",
        "speed        103.5 tokens/s (half of the steps lie between 103.2 and 103.8), MFU 25.0%",
        "time         startup 1.0 s, train 2.0 s, data 0.0 ms, eval 0.0 ms, checkpoint 0.0 ms, record 0.0 ms",
        "kernels      attention: flex, scan: torch",
        "energy       12.5 kJ",
        "sample",
        "def f():",
        "    pass",
        "run          my run",
        "loss         my run/loss.png",
        "look further llmeff compare 'my run'",
    ]


def test_what_is_not_known_of_it_has_no_line(result):
    unknown = {"metrics": {}, "references": {}, "items_per_s": None, "sample": None}
    named = [line.split("  ")[0] for line in _below_the_table(result.model_copy(update=unknown), Path("run"))]
    assert named == ["training", "time", "run", "look further llmeff compare run"]


@pytest.mark.parametrize("missing", ["step", "note", "close", "summary"])
def test_a_display_that_cannot_do_all_that_is_asked_of_one_is_none(missing):
    others = {name: getattr(Silent, name) for name in ("step", "note", "close", "summary") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Half", (Display,), others)()


def test_a_display_that_draws_says_how():
    with pytest.raises(TypeError, match="_draw"):
        type("Blank", (progress._Visible,), {"every_s": 1.0})(SHOWN, _console(is_terminal=False))


@pytest.mark.parametrize(("metric_directions", "is_shown"), [({"loss": "lower"}, False), ({}, True)])
def test_the_summary_shows_the_goals_and_of_an_older_run_all(result, metric_directions, is_shown):
    console = _console(is_terminal=False)
    metrics = {"validation": {"loss": 2.5, "iou.sky": 0.75}}
    show_summary(
        console, result.model_copy(update={"metric_directions": metric_directions, "metrics": metrics}), Path("run")
    )
    assert "loss 2.5000" in console.file.getvalue()
    assert ("iou.sky 0.7500" in console.file.getvalue()) == is_shown


def test_a_sample_cannot_command_the_terminal(result):
    console = _console(is_terminal=True)
    show_summary(console, result.model_copy(update={"sample": "a\x1b]0;b\x07\rc[bold]"}), Path("run"))
    text = console.file.getvalue()
    assert "a\N{REPLACEMENT CHARACTER}]0;b" in text
    assert "c[bold]" in text
    assert "\x07" not in text


def test_a_diverged_run_says_why(result):
    console = _console(is_terminal=False)
    diverged = result.model_copy(update={"status": "diverged", "diagnosis": "The loss of step 5 is nan."})
    show_summary(console, diverged, Path("run"))
    assert "diverged after step 4. The loss of step 5 is nan." in console.file.getvalue()
