import csv
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from llmeff.compare.report import page, verdicts
from llmeff.compare.verdict import judge
from llmeff.compare.verdict_table import FOOTNOTE, render_comparison, tables


@pytest.fixture
def comparison(study):
    return judge(study, command="llmeff compare this")


@pytest.mark.parametrize("kind", ["terminal", "markdown"])
def test_people_read_means_ratios_calls_and_the_command(comparison, kind):
    text = render_comparison(comparison, kind, width=200)
    for part in ("Against base", "steps to loss", "better", "not told apart", "Made again by: llmeff compare this"):
        assert part in text
    assert FOOTNOTE.split(";")[0] in text.replace("\n", " ")


def test_a_wide_table_is_not_cut_at_the_terminal(comparison):
    text = render_comparison(comparison, "terminal", width=80)
    assert "…" not in text


def test_machines_read_plain_numbers(comparison):
    rows = json.loads(render_comparison(comparison, "json"))["table"]
    fast = next(row for row in rows if row["quantity"] == "loss" and row["arm"] == "fast")
    assert fast["call"] == "better"
    assert fast["ratio_lower"] < fast["ratio"] < fast["ratio_upper"] < 1
    assert fast["p_adjusted"] >= fast["p"]
    lines = list(csv.DictReader(io.StringIO(render_comparison(comparison, "csv"))))
    assert len(lines) == len(rows)
    assert float(lines[0]["mean"]) == rows[0]["mean"]


class Page(HTMLParser):
    """Notes what a page has."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(comparison):
    found = Page(page(comparison, "a study"))
    assert found.open == []
    assert found.tags.count("img") == 1
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert "script" not in found.tags


def test_the_verdict_comes_first(comparison):
    text = page(comparison, "a study")
    assert text.index('class="verdict"') < text.index("<img") < text.index("<table")


def test_names_and_texts_are_escaped(study):
    bad = "<script>alert('x')</script> & co"
    runs = [replace(entry, arm=bad) if entry.arm == "fast" else entry for entry in study]
    runs[0] = replace(runs[0], status="failed", loss=None, diagnosis="<img src=x>")
    text = page(judge(runs, command="llmeff <b>"), bad)
    assert "<script>" not in text
    assert "<img src=x>" not in text
    assert "&lt;script&gt;" in text
    assert Page(text).open == []


def test_the_verdict_speaks_of_the_metric(study, with_gain):
    runs = [with_gain(run) for run in study]
    lane = {"base": [1.0, 1.01, 0.99], "fast": [1.5, 1.52, 1.49], "same": [1.0, 1.0, 1.0]}
    comparison = judge(runs, metric="gain", step_times=lane)
    fast, _ = verdicts(comparison.groups[0])
    for part in ("final gain x 1.", "gain at equal time x 1.", "steps to gain 0.", "time to gain 0.", "peak memory"):
        assert part in fast
    assert "loss" not in fast
    text = page(comparison, "a study")
    assert 'alt="held-out gain"' in text
    assert "<td>final loss</td>" in text
    assert "of gain more is better, of all else less" in text


def test_each_arm_has_a_sentence(comparison):
    (group,) = comparison.groups
    assert [line.split(" ")[0] for line in verdicts(group)] == ["fast", "same"]


def test_the_smallest_visible_difference_and_how_arms_were_judged_are_said(comparison):
    text = render_comparison(comparison, "markdown")
    loss = text.partition("| final loss |")[2].split("\n")[1:4]
    assert [line.split("|")[1].strip() for line in loss] == ["ratio to the baseline", "smallest visible", "judged by"]
    rows = json.loads(render_comparison(comparison, "json"))["table"]
    said = next(row for row in rows if row["quantity"] == "loss" and row["arm"] == "same")
    assert f"{said['smallest_visible_ratio'] - 1:.2%}" in loss[1]
    assert said["method"] in loss[2]


@pytest.mark.parametrize("has_again", [False, True])
def test_the_noise_floor_is_in_tables_json_and_page(study, has_again):
    again = [replace(run, arm="base (A/A)", seed=9 + run.seed, repeats="base") for run in study if run.arm == "base"]
    comparison = judge([*study, *(again if has_again else [])])
    noise = comparison.groups[0].noise["loss"]
    shown = next(table for table in tables(comparison) if table.title.startswith("Noise floor: base against itself"))
    row = next(row for row in shown.rows if row[0] == "final loss")
    assert row[-2:] == [f"{noise.sd:.2%}", "6" if has_again else "3"]
    found = next(own for own in json.loads(render_comparison(comparison, "json"))["noise"] if own["quantity"] == "loss")
    assert (found["sd_log_ratio"], found["num_runs"]) == (noise.sd, noise.num_runs)
    assert (found["aa_ratio"] == 1.0) == has_again == ("A/A ratio" in shown.headers)
    assert "Noise floor: base against itself" in page(comparison, "a study")


def test_seeds_and_combinations_that_are_left_out_of_effects_are_named(entry):
    lost = {("bd", 0), ("bd", 1), ("bd", 2), ("ac", 3), ("ad", 3)}
    runs = [
        entry(one + other, seed, loss=1.5 + 0.01 * seed, factors={"one": one, "other": other})
        for seed in range(5) for one in "ab" for other in "cd" if (one + other, seed) not in lost
    ]  # fmt: skip
    comparison = judge(runs)
    text = " ".join(render_comparison(comparison, "text").split())
    left_out = "seeds 3 and combinations (one = b, other = d) lack runs and are left out"
    assert f"Effects on final loss, 12 runs by 4 seeds; {left_out}" in text
    (found,) = {json.dumps([own["dropped_seeds"], own["dropped_combinations"]])
                for own in json.loads(render_comparison(comparison, "json"))["effects"] if own["quantity"] == "loss"}  # fmt: skip
    assert json.loads(found) == [[3], [{"one": "b", "other": "d"}]]


def test_effects_of_few_seeds_are_shown_by_seed_and_what_is_nothing_as_none(entry):
    runs = [
        entry(one + other, seed, factors={"one": one, "other": other}, loss=1.5 * (ratio if one == "b" else 1.0))
        for seed, ratio in enumerate((0.918, 0.946)) for one in "ab" for other in "cd"
    ]  # fmt: skip
    shown = next(table for table in tables(judge(runs)) if table.title.startswith("Effects on final loss"))
    assert shown.title == "Effects on final loss, 8 runs by 2 seeds"
    assert [row[:3] for row in shown.rows] == [
        ["one", "a -> b", "x 0.918, 0.946 (by seed)"],
        ["other", "c -> d", "none"],
        ["one x other", "a -> b x c -> d", "none"],
    ]
    found = json.loads(render_comparison(judge(runs), "json"))["effects"]
    first = next(own for own in found if own["quantity"] == "loss")
    assert (first["ratio_lower"], first["is_none"]) == (None, False)
    assert first["ratio_by_seed"] == {"0": pytest.approx(0.918), "1": pytest.approx(0.946)}


@pytest.mark.parametrize(("spread", "shown"), [(0.01, "%"), (3.0, "x ")])
def test_a_difference_that_is_a_multiple_is_shown_as_one(entry, spread, shown):
    runs = [entry(arm, seed, loss=2.0 * math.exp(spread * (seed - 1)), curve_losses=(), curve_steps=())
            for arm in ("one", "two") for seed in range(3)]  # fmt: skip
    text = render_comparison(judge(runs), "markdown").partition("| final loss |")[2].split("\n")[2]
    assert text.startswith("| smallest visible |")
    assert (shown in text, "%" in text) == (True, spread < 1)
