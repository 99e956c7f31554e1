import math

import numpy as np
import pytest

from llmeff.compare import plots
from llmeff.compare.plots import arm_curves, class_bars, held_out_curves, loss_curve, trials_curves, tuning_curves
from llmeff.compare.verdict import judge
from llmeff.core.config import ConfigError
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
    with pytest.raises(ConfigError, match="no step is done"):
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
    png = plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: found.append(figure.axes[0]) or png(figure))
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
    assert titles[2] == "Sensitivity; trials of more than 1.5 times the best loss lie above"
    assert titles[3] == "Sensitivity; trials of less than 0.67 times the best gain lie below"
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
    assert [text.get_text() for text in axes.texts] == ["0.500", "not there", "1.000", "0.250", "0.750", "0.000"]
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
