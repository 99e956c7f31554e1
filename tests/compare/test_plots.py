import math

import numpy as np
import pytest

from llmeff.compare import plots
from llmeff.compare.plots import (
    Curves,
    arm_curves,
    class_bars,
    curves,
    trials_curves,
    tuning_curves,
)
from llmeff.compare.verdict import judge
from llmeff.core.config import ConfigError
from llmeff.record import loss_curve as loss_curves
from llmeff.record.loss_curve import held_out_curves, loss_curve
from llmeff.record.reader import read_run


def _size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


@pytest.mark.parametrize("steps", [1, 4, 120])
def test_a_curve_of_any_length_is_a_picture(make_run, tmp_path, steps):
    path = tmp_path / "loss.png"
    loss_curve([read_run(make_run("run", steps=steps))], path)
    assert _size(path) == (1200, 675)


@pytest.mark.parametrize("loss", [math.nan, -1.0, 0.0])
def test_a_loss_that_no_logarithm_takes_is_drawn(make_run, tmp_path, loss):
    runs = [read_run(make_run("good")), read_run(make_run("bad", loss=loss, is_finished=False))]
    loss_curve(runs, tmp_path / "loss.png")
    assert _size(tmp_path / "loss.png") == (1200, 675)


def test_nothing_to_draw_and_nowhere_to_draw(make_run, tmp_path):
    with pytest.raises(ConfigError, match="no run has recorded a step"):
        loss_curve([read_run(make_run("empty", steps=0, is_finished=False))], tmp_path / "loss.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        loss_curve([read_run(make_run("run"))], tmp_path / "nowhere" / "loss.png")


@pytest.mark.parametrize("is_older", [False, True])
def test_held_out_loss_is_a_mean_over_items_not_over_units(make_run, is_older):
    # Units of 1 and 3 items with sums 10 / step and 30 / step.
    folder = make_run("run", steps=4)
    if is_older:
        (folder / "evaluations.jsonl").unlink()
    steps, values = held_out_curves(read_run(folder))["validation"]
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_allclose(values["loss"], [40 / 2 / 4, 40 / 4 / 4])


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each picture, as it is drawn."""
    found = []
    png = plots.as_png
    monkeypatch.setattr(plots, "as_png", lambda figure: found.append(figure.axes[0]) or png(figure))
    return found


def test_a_metric_of_which_more_is_better_is_drawn_as_the_loss_is(study, entry, with_gain, drawn):
    rates = [(1e-3, 1.7), (3e-3, 1.5), (1e-2, 9.0)]
    trials = [entry("base", 1000, phase="tuning", trial={"optim.lr": rate}, loss=loss) for rate, loss in rates]
    runs = [with_gain(run) for run in [*study, *trials]]
    (loss,), (gain,) = (judge(runs, metric=metric).groups for metric in ("loss", "gain"))
    for draw in (arm_curves, tuning_curves, trials_curves):
        assert draw(loss)[:8] == draw(gain)[:8] == b"\x89PNG\r\n\x1a\n"
    labels = [axes.get_ylabel() for axes in drawn]
    assert labels == [
        "held-out loss (nats per token)", "held-out gain", "loss of the trial (nats)", "gain of the trial",
        "expected loss of the best (nats)", "expected gain of the best",
    ]  # fmt: skip
    titles = [axes.get_title(loc="left") for axes in drawn]
    assert titles[2] == "Sensitivity; trials with more than 1.5 times the best loss lie above the plot"
    assert titles[3] == "Sensitivity; trials with less than 0.67 times the best gain lie below the plot"
    assert titles[4:] == ["Loss against tuning budget", "Gain against tuning budget"]
    best_final = min(min(run.curve_losses) for run in study)
    for of_loss, of_gain, best in ((drawn[0], drawn[1], best_final), (drawn[2], drawn[3], 1.5)):
        assert of_loss.get_ylim()[0] < best < of_loss.get_ylim()[1]
        assert of_gain.get_ylim()[0] < 1 / best < of_gain.get_ylim()[1]
    assert drawn[2].get_ylim()[1] < 9.0  # what is far off would press the others together
    assert drawn[3].get_ylim()[0] > 1 / 9.0


def test_bars_are_as_long_as_shares_and_a_class_that_is_nowhere_has_none(drawn):
    classes = ["sky", "$road$", "car"]
    class_bars({"_a": [0.5, math.nan, 1.0], "b": [0.25, 0.75, 0.0]}, classes, "IoU", "IoU by class")
    (axes,) = drawn
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0, 1, 0.25, 0.75, 0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == classes
    assert [text.get_text() for text in axes.texts] == ["0.500", "class absent", "1.000", "0.250", "0.750", "0.000"]
    above, below = (axes.patches[number].get_y() for number in (0, 3))
    assert above < below  # the first run is above, on an axis that runs downwards
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert labels == [" _a (mean 0.750)", "b (mean 0.333)"]


@pytest.mark.parametrize(("num_runs", "num_classes"), [(1, 2), (7, 40)])
def test_bars_of_any_number_are_a_picture(tmp_path, num_runs, num_classes):
    values = {f"run {number}": [0.5] * num_classes for number in range(num_runs)}
    path = tmp_path / "classes.png"
    path.write_bytes(class_bars(values, [f"class {number}" for number in range(num_classes)], "IoU", "all"))
    assert _size(path)[0] == 1200


@pytest.fixture
def figures(monkeypatch):
    """Each picture, in place of its file."""
    found = []
    monkeypatch.setattr(plots, "as_png", lambda figure: found.append(figure) or b"")
    return found


@pytest.fixture
def sketched(monkeypatch):
    """The axes of each picture, in place of its file."""
    found = []
    for module in (plots, loss_curves):
        monkeypatch.setattr(module, "as_png", lambda figure: found.append(figure.axes[0]) or b"")
    return found


def lines(axes):
    """What a legend calls each line, and its points."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_a_loss_is_drawn_as_it_is_and_as_the_mean_of_a_fiftieth_of_all_steps(make_run, tmp_path, sketched):
    """Of 200 steps four are averaged, each mean at the third of its steps."""
    run = read_run(make_run("run", steps=200))
    loss_curve([run], tmp_path / "loss.png")
    (axes,) = sketched
    losses = run.steps["loss"]
    raw, smooth, held_out = axes.lines
    assert raw.get_xydata().tolist() == [[step, loss] for step, loss in enumerate(losses, start=1)]
    assert smooth.get_label() == "training"
    assert len(smooth.get_xdata()) == 197
    assert (smooth.get_xdata()[0], smooth.get_xdata()[-1]) == (3, 199)
    assert smooth.get_ydata()[[0, -1]] == pytest.approx([losses[:4].mean(), losses[-4:].mean()])
    assert held_out.get_label() == f"validation, last {10 / 200:.4f}"
    assert held_out.get_xydata()[:2].tolist() == [[2, 5.0], [4, 2.5]]
    assert axes.get_title(loc="left") == "run (thick: mean of 4 steps, thin: each step)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    assert (axes.get_yscale(), axes.get_xlim()[0]) == ("log", 0)


def test_several_runs_are_named_and_smoothed_alike(make_run, tmp_path, sketched):
    runs = [read_run(make_run("long", steps=100)), read_run(make_run("_short_$x$", steps=4, is_finished=False))]
    loss_curve([*runs, read_run(make_run("none", steps=0, is_finished=False))], tmp_path / "loss.png")
    (axes,) = sketched
    assert {label: len(points) for label, points in lines(axes).items()} == {
        "long: training": 100, "long: validation, last 0.1000": 50, " _short_$x$: training": 4,
        " _short_$x$: validation, last 2.5000": 2,
    }  # fmt: skip
    assert axes.get_title(loc="left") == "2 runs"
    assert axes.get_ylabel() == "loss (nats per token)"  # which the finished one says
    assert [text.get_parse_math() for text in axes.get_legend().get_texts()] == [False] * 4
    assert len({line.get_color() for line in axes.lines}) == 2


def test_losses_that_are_nowhere_above_nothing_are_on_a_plain_axis_and_their_items_unknown(
    make_run, tmp_path, sketched
):
    run = read_run(make_run("run", loss=math.nan, is_finished=False))
    loss_curve([run], tmp_path / "loss.png")
    (axes,) = sketched
    assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "loss (nats per item)")
    assert "no finite loss" in lines(axes)


def flat(entry, arm, seed, losses, steps=(0, 50, 100), **changes):
    return entry(arm, seed, curve_steps=steps, curve_losses=losses, loss=losses[-1], **changes)


def test_arms_are_drawn_over_items_as_means_and_bands_and_runs_evaluated_otherwise_are_left_out(entry, sketched):
    runs = [
        flat(entry, "one", 0, (4.0, 3.0, 2.0)), flat(entry, "one", 1, (4.0, 3.5, 2.5)),
        flat(entry, "one", 2, (4.0, 3.9, 3.0, 3.0), steps=(0, 60, 90, 100)),
        flat(entry, "one", 3, (4.0, math.nan, 2.5)),
        flat(entry, "three", 0, (2.0,), steps=(100,)),
        flat(entry, "_two", 0, (4.0, 2.0, 1.0)),
    ]  # fmt: skip
    (group,) = judge(runs, target=2.25).groups
    assert arm_curves(group) is not None
    (axes,) = sketched
    assert lines(axes) == {
        "one (n = 2)": [[0, 4.0], [3200, 3.25], [6400, 2.25]],
        " _two (n = 1)": [[0, 4.0], [3200, 2.0], [6400, 1.0]],
        "three: no curve": [],
        "target 2.2500": [[0, 2.25], [1, 2.25]],
    }
    first, second = (band.get_paths()[0].vertices for band in axes.collections)
    assert {tuple(point) for point in first.tolist()} == {
        (0, 4.0), (3200, 3.0), (3200, 3.5), (6400, 2.0), (6400, 2.5),
    }  # fmt: skip
    assert second[:, 1].min() == 1.0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens trained on", "held-out loss (nats per token)")
    assert axes.get_title(loc="left") == "Mean and range over seeds"
    # from the best that any came to, to the worst mean after a quarter of the evaluations, and a twentieth more
    assert axes.get_ylim() == pytest.approx((1.0 - 0.05 * 3 - 1e-6, 4.0 + 0.05 * 3 + 1e-6))
    assert axes.get_xlim()[0] == 0


@pytest.mark.parametrize(("num", "is_beside"), [(6, False), (7, True)])
def test_a_legend_of_many_arms_stands_beside_the_picture_and_no_two_are_alike(entry, sketched, num, is_beside):
    runs = [flat(entry, f"arm {number}", 0, (4.0, 3.0, 2.0 + number / 10)) for number in range(num)]
    (group,) = judge([*runs, *[flat(entry, f"more {number}", 0, (4.0, 3.0, 2.0)) for number in range(num - 6)]]).groups
    assert arm_curves(group) is not None
    (axes,) = sketched
    anchor = axes.get_legend().get_bbox_to_anchor().transformed(axes.transAxes.inverted())
    assert ((anchor.x0, anchor.y0) == pytest.approx((1, 1))) == is_beside
    drawn_arms = axes.lines[: len(group.arms)]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn_arms}) == len(group.arms)


def tried(entry, arm, losses, field="optim.lr", cell=None):
    return [
        entry(arm, 1000, phase="tuning", trial={field: 10.0 ** (number - 4)}, name=f"{arm}/trial-{number}",
              cell=cell or {}, loss=loss, status="finished" if loss is not None else "diverged")
        for number, loss in enumerate(losses)
    ]  # fmt: skip


def test_trials_are_drawn_over_what_was_searched_by_every_arm_that_has_some(entry, sketched):
    cell = {"train.batch": 8}
    finals = [flat(entry, arm, 0, (4.0, 3.0, 2.0), cell=cell) for arm in ("lost", "none", "one", "two")]
    trials = [
        *tried(entry, "lost", [None, None, None], cell=cell), *tried(entry, "one", [1.7, 1.5, None], cell=cell),
        *tried(entry, "two", [2.0, 1.6, 1.9], cell=cell),
    ]  # fmt: skip
    (group,) = judge([*finals, *trials]).groups
    assert tuning_curves(group) is not None
    assert trials_curves(group) is not None
    over_rates, over_trials = sketched
    assert lines(over_rates) == {
        "one": [[1e-4, 1.7], [1e-3, 1.5]], "two": [[1e-4, 2.0], [1e-3, 1.6], [1e-2, 1.9]],
    }  # fmt: skip
    assert (over_rates.get_xscale(), over_rates.get_xlabel()) == ("log", "optim.lr")
    assert over_rates.get_title(loc="left") == "Sensitivity, train.batch = 8"
    assert over_rates.get_ylim() == pytest.approx((1.5 - 0.025 - 1e-3, 2.0 + 0.025 + 1e-3))
    assert lines(over_trials) == {
        "lost": [], "one": [[2, pytest.approx(4.7 / 3)], [3, 1.5]], "two": [[1, pytest.approx(5.5 / 3)], [2, pytest.approx(5.1 / 3)], [3, 1.6]],
    }  # fmt: skip
    assert (over_trials.get_xlabel(), over_trials.get_title(loc="left")) == (
        "trials", "Loss against tuning budget, train.batch = 8",
    )  # fmt: skip


def test_without_trials_that_end_nothing_is_drawn_of_them(entry, study, sketched):
    (plain,) = judge(study).groups
    (lost,) = judge([*study, *tried(entry, "base", [None, None])]).groups
    (single,) = judge([*study, *tried(entry, "base", [2.0])]).groups
    assert [draw(group) for draw in (tuning_curves, trials_curves) for group in (plain, lost)] == [None] * 4
    assert trials_curves(single) is None
    assert sketched == []


def test_panels_stand_side_by_side_and_share_one_legend(figures):
    panels = [Curves(label="seconds", values={"_a": [1.0, 2.0, 8.0], "b": [1.0, 4.0, 16.0]}),
              Curves(label="bytes", values={"_a": [5.0, 5.0, 5.0], "b": [1.0, 2.0, 4.0]})]  # fmt: skip
    curves([128, 256, 1024], panels, "tokens", "a title of $x$")
    (figure,) = figures
    left, right = figure.axes
    assert figure.get_size_inches().tolist() == [10, 5]
    assert lines(right) == {
        " _a": [[128, 5.0], [256, 5.0], [1024, 5.0]], "b": [[128, 1.0], [256, 2.0], [1024, 4.0]],
    }  # fmt: skip
    assert (left.get_ylabel(), right.get_ylabel(), left.get_xlabel()) == ("seconds", "bytes", "tokens")
    assert (left.get_legend(), [text.get_text() for text in right.get_legend().get_texts()]) == (None, [" _a", "b"])
    anchor = right.get_legend().get_bbox_to_anchor().transformed(right.transAxes.inverted())
    assert (anchor.x0, anchor.y0) == pytest.approx((1, 1))
    assert left.get_position().x1 < right.get_position().x0
    for axes in (left, right):
        assert (axes.get_xscale(), axes.get_yscale(), axes.xaxis.get_transform().base) == ("log", "log", 2)
        assert axes.get_xticks().tolist() == [128, 256, 1024]
        assert [axes.xaxis.get_major_formatter()(place) for place in (128, 1024)] == ["128", "1024"]
        assert {label.get_rotation() for label in axes.get_xticklabels()} == {45.0}
    assert (figure.get_suptitle(), figure._suptitle.get_parse_math()) == ("a title of $x$", False)


def test_a_panel_of_what_was_known_and_what_was_not_has_plain_axes_and_a_line_between(figures):
    curves([64, 128, 256], [Curves(label="loss", values={"a": [1.0, 2.0, 8.0]})], "tokens", "", until=128.0)
    (figure,) = figures
    (axes,) = figure.axes
    assert figure.get_size_inches().tolist() == [8, 5]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlim()[0]) == ("linear", "linear", 0)
    assert [line.get_xdata() for line in axes.lines[1:]] == [[128.0, 128.0]]
    assert axes.get_legend() is not None


def test_names_are_shown_as_they_are_written(sketched):
    class_bars({"$a$ b": [0.5, 1.0]}, ["$x$", "y"], "IoU", "$t$")
    (axes,) = sketched
    texts = [*axes.figure.legends[0].get_texts(), *axes.get_yticklabels(), axes._left_title]
    assert [text.get_text() for text in texts] == ["$a$ b (mean 0.750)", "$x$", "y", "$t$"]
    assert [text.get_parse_math() for text in texts] == [False] * 4
    assert axes.get_legend() is None
    assert (axes.get_xlabel(), axes.get_title(loc="left"), axes.get_xlim()) == ("IoU", "$t$", (0, 1))


def test_a_picture_is_a_png_whatever_the_users_matplotlib_writes():
    import matplotlib as mpl

    with mpl.rc_context({"savefig.format": "pdf"}):
        assert class_bars({"a": [0.5]}, ["x"], "IoU", "title")[:4] == b"\x89PNG"
