import csv
import io
import json
import math
from dataclasses import replace

import pytest

from llmeff.compare.table import CAVEAT, FOOTNOTE, compare, render
from llmeff.core.config import ConfigError


@pytest.fixture
def rows(make_run):
    return compare([make_run("done", steps=4), make_run("cut", steps=3, is_finished=False)])


def test_finished_and_unfinished_runs_stand_side_by_side(rows):
    done, cut = rows
    assert (done.name, done.status, done.steps, done.items) == ("done", "finished", 4, 256)
    assert done.train_loss == pytest.approx((4 + 2 + 4 / 3 + 1) / 4)
    assert (done.validation_loss, done.bits_per_byte, done.parameters) == (2.5, 1.75, 1000)
    assert (done.metrics, cut.metrics) == ({"accuracy": 0.4}, {})
    assert (done.items_per_s, done.peak_bytes) == (103.5, 100 * 2**20)
    assert done.errors == {"parameters": 0.0, "peak_bytes": pytest.approx(-0.05)}
    assert (cut.status, cut.steps, cut.items_per_s) == ("unfinished at step 3", 3, 103.0)
    assert (cut.validation_loss, cut.parameters, cut.errors) == (None, None, {})


def test_all_folders_that_are_no_runs_are_named_at_once(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        compare([make_run("done"), tmp_path / "empty", tmp_path / "nowhere"])
    assert len(caught.value.problems) == 2
    assert "empty: is not a run folder" in str(caught.value)
    assert "nowhere: there is no such folder" in str(caught.value)


@pytest.mark.parametrize("kind", ["terminal", "markdown", "json"])
def test_it_says_that_one_run_has_no_interval(rows, kind):
    assert CAVEAT in render(rows, kind, width=100)


def test_markdown(rows):
    header, rule, done, cut, *_ = render(rows, "markdown").splitlines()
    cells = dict(zip(header.split(" | "), done.split(" | "), strict=True))
    assert cells["tokens/s"] == "103.5"
    assert cells["peak memory"] == "100.00 MiB"
    assert (cells["validation loss"], cells["accuracy"]) == ("2.5000", "0.4000")
    assert len(rule.split("|")) == len(cut.split("|"))
    assert " - " in cut


def test_a_bar_in_a_name_does_not_break_markdown(make_run):
    header, _, row, *_ = render(compare([make_run("a|b")]), "markdown").splitlines()
    assert row.replace(r"\|", "").count("|") == header.count("|")


def test_csv_and_json_hold_plain_numbers(rows):
    done, cut = csv.DictReader(io.StringIO(render(rows, "csv")))
    assert (done["peak_bytes"], done["error_of_parameters"]) == (str(100.0 * 2**20), "0.0")
    assert (done["accuracy"], cut["accuracy"]) == ("0.4", "")
    assert (cut["peak_bytes"], cut["error_of_parameters"]) == ("", "")
    done, cut = json.loads(render(rows, "json"))["runs"]
    assert (done["peak_bytes"], cut["peak_bytes"]) == (100 * 2**20, None)


def test_losses_over_many_units_have_a_ratio_with_an_interval(make_run):
    units = range(1, 121)
    runs = [make_run("first", units=units), make_run("half", units=units, scale=0.5), make_run("few", scale=0.5)]
    first, half, few = compare(runs)
    assert first.loss_ratio is None
    assert few.loss_ratio is None
    assert half.loss_ratio.value == pytest.approx(0.5)
    assert half.loss_ratio.n == 120
    assert "0.5000 (0.5000 to 0.5000)" in render([first, half], "markdown")
    assert json.loads(render([first, half], "json"))["runs"][1]["loss_ratio_upper"] == pytest.approx(0.5)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_cuts_nothing_off(make_run, width):
    runs = [make_run(f"run-{n}", steps=4, is_finished=n != 2) for n in range(5)]
    text = render(compare(runs), "terminal", width)
    assert "…" not in text
    assert [f"run-{n}" in text for n in range(5)] == [True] * 5
    assert max(map(len, text.splitlines())) <= width


def test_an_unknown_format_names_the_nearest(rows):
    with pytest.raises(ConfigError, match="Did you mean 'markdown'"):
        render(rows, "markdwn")


def test_no_runs_are_an_empty_table():
    assert render([], "csv") == "\n"


def test_a_ratio_of_losses_is_of_the_units_of_the_end(make_run):
    """The result says that the run ended at its fourth step; an evaluation behind it is none of its end."""
    runs = [make_run(name, steps=steps, units=range(1, 121)) for name, steps in (("first", 4), ("behind", 6))]
    assert compare(runs)[1].loss_ratio.value == pytest.approx(1.0)


def test_losses_of_other_units_splits_or_data_have_no_ratio(make_run):
    units = range(1, 121)
    first, other = make_run("first", units=units), make_run("other", units=range(2, 122))
    moved, cut = make_run("moved", units=units), make_run("cut", units=units, is_finished=False)
    data = json.loads((moved / "result.json").read_text())
    (moved / "result.json").write_text(json.dumps(data | {"data": {"sha256": "1" * 64}}))
    many = make_run("just enough", units=range(1, 101))
    few = make_run("few", units=range(1, 100))
    assert [row.loss_ratio for row in compare([first, other, moved, cut])] == [None] * 4
    assert compare([many, many])[1].loss_ratio.n == 100
    assert compare([few, few])[1].loss_ratio is None


def test_what_people_read_of_runs(rows):
    header, _, done, cut, _, caveat, footnote = render(rows, "markdown").splitlines()
    cells = [
        dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True)) for row in (done, cut)
    ]
    assert cells[0] == {
        "run": "done", "status": "finished", "steps": "4", "tokens": "256", "parameters": "1.0k", "training loss": "2.0833",
        "validation loss": "2.5000", "bits per byte": "1.7500", "accuracy": "0.4000", "tokens/s": "103.5",
        "peak memory": "100.00 MiB", "device": "cpu", "error of parameters": "+0.00%", "error of peak bytes": "-5.00%",
    }  # fmt: skip
    assert [name for name, cell in cells[1].items() if cell == "-"] == [
        "parameters", "validation loss", "bits per byte", "accuracy", "peak memory", "error of parameters",
        "error of peak bytes",
    ]  # fmt: skip
    assert (caveat, footnote) == (CAVEAT, FOOTNOTE)
    assert "Note: one.\nNote: two.\nThese are single runs" in render(rows, "markdown", notes=["one", "two"])


def test_runs_of_other_items_are_counted_in_items(rows):
    pixels = [replace(rows[0], item="pixel"), rows[0]]
    assert "| items |" in render(pixels, "markdown")
    assert "| tokens |" in render(rows, "markdown")


def test_csv_and_json_have_a_name_for_all_that_is_known(rows):
    known = [
        "name", "status", "device", "steps", "items", "item", "parameters", "train_loss", "validation_loss", "bits_per_byte",
        "items_per_s", "peak_bytes", "loss_ratio", "loss_ratio_lower", "loss_ratio_upper", "accuracy", "error_of_parameters",
        "error_of_peak_bytes",
    ]  # fmt: skip
    assert render(rows, "csv").splitlines()[0].split(",") == known
    found = json.loads(render([replace(rows[0], train_loss=math.inf), rows[1]], "json", notes=["one"]))
    assert list(found) == ["caveat", "footnote", "notes", "runs"]
    assert (found["caveat"], found["footnote"], found["notes"]) == (CAVEAT, FOOTNOTE, ["one"])
    assert [list(row) for row in found["runs"]] == [known, known]
    assert found["runs"][0]["train_loss"] is None


def test_at_the_terminal_each_run_is_a_column(rows):
    lines = render(rows, "terminal", 200).splitlines()
    shown = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in
             (line.strip("│┃").replace("┃", "│").split("│") for line in lines if line[:1] in "│┃" and line)}  # fmt: skip
    assert shown["run"] == ["done", "cut"]
    assert shown["status"] == ["finished", "unfinished at step 3"]
    assert shown["tokens"] == ["256", "192"]
