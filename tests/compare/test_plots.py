import math

import numpy as np
import pytest

from llmeff.compare.plots import held_out_loss, loss_curve
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


def test_held_out_loss_is_a_mean_over_items_not_over_units(make_run):
    # Units of 1 and 3 items with sums 10 / step and 30 / step.
    steps, means = held_out_loss(read_run(make_run("run", steps=4)))["validation"]
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_allclose(means, [40 / 2 / 4, 40 / 4 / 4])
