import csv
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from llmeff.compare.intervals import Difference, Estimate
from llmeff.compare.quantities import Quantity
from llmeff.compare.report import page, title_of, verdicts, write_report
from llmeff.compare.row import Cell
from llmeff.compare.text_table import TextTable, markdown, render_tables
from llmeff.compare.verdict import judge
from llmeff.compare.verdict_table import (
    FOOTNOTE,
    effects_tables,
    group_tables,
    render_comparison,
    show_mean,
    show_ratio,
    show_value,
    tables,
    terminal,
)
from llmeff.core.config import ConfigError


@pytest.fixture
def comparison(study):
    return judge(study, command="llmeff compare this")


@pytest.mark.parametrize("kind", ["terminal", "markdown"])
def test_people_read_means_ratios_calls_and_the_command(comparison, kind):
    text = render_comparison(comparison, kind, width=200)
    for part in (
        "Against base",
        "steps to loss",
        "better",
        "no detectable difference",
        "Command to reproduce this: llmeff compare this",
    ):
        assert part in text
    assert FOOTNOTE in " ".join(text.split())


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
    assert "higher is better for gain, lower for everything else" in text


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
    left_out = "left out because runs are missing: seeds 3 and combinations (one = b, other = d)"
    assert f"Effects on final loss, 12 runs over 4 seeds; {left_out}" in text
    (found,) = {json.dumps([own["dropped_seeds"], own["dropped_combinations"]])
                for own in json.loads(render_comparison(comparison, "json"))["effects"] if own["quantity"] == "loss"}  # fmt: skip
    assert json.loads(found) == [[3], [{"one": "b", "other": "d"}]]


def test_effects_of_few_seeds_are_shown_by_seed_and_what_is_nothing_as_none(entry):
    runs = [
        entry(one + other, seed, factors={"one": one, "other": other}, loss=1.5 * (ratio if one == "b" else 1.0))
        for seed, ratio in enumerate((0.918, 0.946)) for one in "ab" for other in "cd"
    ]  # fmt: skip
    shown = next(table for table in tables(judge(runs)) if table.title.startswith("Effects on final loss"))
    assert shown.title == "Effects on final loss, 8 runs over 2 seeds"
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


# -- tables by hand


def quantity(show):
    return Quantity(key="it", label="it", show=show, value=lambda entry: entry.loss)


@pytest.mark.parametrize(
    ("show", "value", "shown"),
    [
        ("memory", 1536.0, "1.50 KiB"),
        ("duration", 0.0123, "12.3 ms"),
        ("energy", 1500.0, "1.5 kJ"),
        ("count", 1500.0, "1.5k"),
        ("number", 1500.0, "1500.0000"),
    ],
)
def test_values_are_shown_with_their_units(show, value, shown):
    assert show_value(quantity(show), value) == shown


@pytest.mark.parametrize(
    ("values", "num_seeds", "mean", "shown"),
    [
        ({}, 0, None, "no trial finished"),
        ({0: 1.0}, 2, None, "1 of 2 runs"),
        ({0: 1.5}, 1, (1.5, math.nan, math.nan), "1.5000"),
        ({0: 1.0, 1: 2.0}, 2, (1.5, math.nan, math.nan), "1.0000, 2.0000 (by seed)"),
        ({0: 1.0, 1: 2.0, 2: 1.5}, 3, (1.5, 0.25, 2.75), "1.5000 (0.2500 to 2.7500)"),
        ({0: 1.5, 1: 1.5, 2: 1.5}, 3, (1.5, 1.5, 1.5), "1.5000"),
    ],
)
def test_a_mean_is_shown_with_what_is_known_of_it(values, num_seeds, mean, shown):
    own = None if mean is None else Estimate(value=mean[0], lower=mean[1], upper=mean[2], n=len(values))
    cell = Cell(values=values, num_seeds=num_seeds, mean=own, difference=None, p_adjusted=math.nan, call="")
    assert show_mean(quantity("number"), cell) == shown
    assert show_ratio(cell) == ""


@pytest.mark.parametrize(
    ("ratio", "call", "shown"),
    [
        ((0.5, 0.25, 0.75), "better", "x 0.5 (0.25 to 0.75) better"),
        ((0.5, 0.5, 0.5), "equal", "x 0.5 equal"),
        ((0.5, math.nan, math.nan), "", "x 0.5"),
    ],
)
def test_a_ratio_is_shown_with_what_may_be_said_of_it(ratio, call, shown):
    own = Estimate(value=ratio[0], lower=ratio[1], upper=ratio[2], n=3)
    difference = Difference(ratio=own, p=0.5, smallest_visible=1.1)
    cell = Cell(values={}, num_seeds=3, mean=None, difference=difference, p_adjusted=0.5, call=call)
    assert show_ratio(cell) == shown


def flat(entry, arm, seed, loss, **changes):
    return entry(
        arm, seed, loss=loss, curve_losses=(), curve_steps=(), measured={}, peak_bytes=None, train_loss=None, **changes
    )


CELL = {"train.batch": 8}


def test_the_table_of_a_cell_is_titled_and_has_a_row_for_what_is_there(entry):
    runs = [flat(entry, arm, seed, loss, cell=CELL) for arm, losses in
            (("base", (2.0, 2.5, 2.25)), ("same", (2.0, 2.5, 2.25))) for seed, loss in enumerate(losses)]  # fmt: skip
    runs = [replace(run, tuned_as="base") if run.arm == "same" else run for run in runs]
    runs.append(flat(entry, "lone", 0, 1.5, cell=CELL))
    (shown,) = (table for table in group_tables(judge(runs).groups[0]) if table.title.startswith("Against"))
    assert shown.title == "Against base, train.batch = 8; seeds: base 3, same 3, lone 1"
    assert shown.headers == ["", "base", "same", "lone"]
    assert [row[0] for row in shown.rows] == ["final loss", "  ratio to the baseline"]
    assert shown.rows[0][3] == "1.5000"
    assert shown.rows[1] == [
        "  ratio to the baseline",
        "",
        "x 1 equal",
        f"x {1.5 / (2 * 2.5 * 2.25) ** (1 / 3):.4g} one run",
    ]
    (shown,) = group_tables(judge([run for run in runs if run.arm != "lone"]).groups[0])[:1]
    assert shown.title == "Against base, train.batch = 8; seeds: 3"


def tried(entry, arm, losses, rates):
    return [
        flat(entry, arm, 1000, loss, cell=CELL, phase="tuning", trial={"optim.lr": rate}, name=f"{arm}/{rate}",
             status="finished" if loss else "diverged")
        for loss, rate in zip(losses, rates, strict=True)
    ]  # fmt: skip


def test_the_table_of_tuning_has_a_row_for_each_arm(entry):
    runs = [flat(entry, arm, 0, 2.0, cell=CELL) for arm in ("one", "two")]
    runs += tried(entry, "one", [2.0, 2.01, None], [0.123456, 0.25, 1]) + tried(entry, "two", [None], ["big"])
    (group,) = judge(runs).groups
    (shown,) = (table for table in group_tables(group) if table.title.startswith("Tuning"))
    assert shown.title == "Tuning, train.batch = 8"
    assert shown.headers == [
        "arm",
        "trials",
        "chosen",
        "within 1 % of the best",
        "expected best after 1, 2, ... trials",
    ]
    assert shown.rows == [
        ["one", "3", "optim.lr = 0.1235", "optim.lr x 2.03", f"- {(2 + 2 + 2.01) / 3:.4f} 2.0000"],
        ["two", "1", "none", "-", "-"],
    ]


def test_the_table_of_predictions_has_a_row_for_each_quantity(entry):
    runs = [flat(entry, arm, 0, 2.0) for arm in ("one", "two")]
    runs[0] = replace(runs[0], predicted={"peak_bytes": 90.0}, measured={"peak_bytes": 100.0})
    runs[1] = replace(runs[1], predicted={"peak_bytes": 102.0}, measured={"peak_bytes": 100.0})
    shown = tables(judge(runs))[-1]
    assert shown.title == "Predicted / measured - 1, over all runs"
    assert shown.headers == ["quantity", "runs", "median error", "worst", "in"]
    assert shown.rows == [["peak bytes", "2", "6.000%", "-10.000%", "one/seed-0"]]


def factorial(entry, seeds=3, **changes):
    return [
        entry(one + other, seed, factors={"one": one, "other": other}, cell=CELL,
              peak_bytes=100.0 * (2 if one == "b" else 1), predicted={"peak_bytes": 50.0 * (2 if one == "b" else 1)},
              loss=(1.5 + 0.01 * seed) * (1.2 + 0.02 * seed if one == "b" else 1.0), **changes)
        for seed in range(seeds) for one in "ab" for other in "cd"
    ]  # fmt: skip


def test_the_table_of_effects_has_ratios_predictions_and_what_would_have_been_seen(entry):
    (group,) = judge(factorial(entry)).groups
    shown = {table.title: table for table in effects_tables(group)}
    memory = shown["Effects on peak memory, train.batch = 8, 12 runs"]
    assert memory.headers == ["factor", "levels", "ratio", "predicted", "p (Holm)", "smallest visible"]
    assert memory.rows == [
        ["one", "a -> b", "x 2", "x 2", "0", "-"],
        ["other", "c -> d", "none", "x 1", "-", "-"],
        ["one x other", "a -> b x c -> d", "none", "x 1", "-", "-"],
    ]
    loss = shown["Effects on final loss, train.batch = 8, 12 runs over 3 seeds"]
    effect = group.effects["loss"].effects[0]
    assert loss.rows[0] == [
        "one", "a -> b", f"x 1.22 ({effect.ratio.lower:.4g} to {effect.ratio.upper:.4g})", "-", f"{effect.p_adjusted:.2g}",
        f"{effect.smallest_visible - 1:.2%}",
    ]  # fmt: skip
    half = [replace(run, factors=run.factors | {"third": "e" if (run.arm in ("ac", "bd")) else "f"}) for run in
            factorial(entry, seeds=1)]  # fmt: skip
    (aliased,) = (
        own.title for own in effects_tables(judge(half).groups[0]) if own.title.startswith("Effects on final loss")
    )
    assert aliased.endswith(
        "4 runs over 1 seeds; left out because aliased with these effects: one x other, one x third, other x third"
    )


KEYS = {
    "table": [
        "cell", "quantity", "arm", "baseline", "num_seeds", "num_with_value", "mean", "mean_lower", "mean_upper", "ratio",
        "ratio_lower", "ratio_upper", "p", "p_adjusted", "method", "smallest_visible_ratio", "call",
    ],
    "tuning": ["cell", "arm", "trials", "best", "expected_best", "at_edge", "near_factor"],
    "effects": [
        "cell", "quantity", "factors", "levels", "ratio", "ratio_lower", "ratio_upper", "p_holm", "smallest_visible_ratio",
        "is_none", "ratio_by_seed", "dropped_seeds", "dropped_combinations", "predicted_ratio",
    ],
    "noise": ["cell", "quantity", "aa_ratio", "aa_ratio_lower", "aa_ratio_upper", "sd_log_ratio", "num_runs"],
}  # fmt: skip
"""Of the rows of each list; who reads a comparison counts on them."""


def test_json_has_a_name_for_all_that_is_found(entry):
    trials = [replace(run, factors={}) for run in tried(entry, "ac", [2.0, None], [0.1, 0.2])]
    comparison = judge([*factorial(entry), *trials], target=1.55, command="llmeff it", notes=["a note"])
    (group,) = comparison.groups
    found = json.loads(render_comparison(comparison, "json"))
    assert list(found) == [
        "metric", "metric_directions", "table", "targets", "budgets", "tuning", "effects", "noise", "calibration", "notes", "footnote",
        "command",
    ]  # fmt: skip
    where = "train.batch = 8"
    for part, keys in KEYS.items():
        assert [list(row) for row in found[part]] == [keys] * len(found[part]), part
        assert {row["cell"] for row in found[part]} == {where}
    assert (found["metric"], found["command"], found["footnote"]) == ("loss", "llmeff it", FOOTNOTE)
    assert found["metric_directions"] == {"loss": "lower", "bits_per_byte": "lower"}
    assert (found["targets"], found["budgets"]) == ({where: 1.55}, {where: group.budgets})
    assert found["notes"][0] == "a note"
    assert found["tuning"] == [{
        "cell": where, "arm": "ac", "best": {"optim.lr": 0.1}, "expected_best": [None, 2.0], "at_edge": ["optim.lr"],
        "trials": [{"settings": {"optim.lr": 0.1}, "loss": 2.0}, {"settings": {"optim.lr": 0.2}, "loss": None}],
        "near_factor": {"optim.lr": 1.0},
    }]  # fmt: skip
    first = next(row for row in found["effects"] if row["quantity"] == "peak_bytes")
    assert (first["factors"], first["levels"], first["ratio"], first["predicted_ratio"], first["p_holm"]) == (
        ["one"], "a -> b", pytest.approx(2.0), pytest.approx(2.0), 0.0,
    )  # fmt: skip
    own, effect = next(row for row in found["effects"] if row["quantity"] == "loss"), group.effects["loss"].effects[0]
    assert (own["smallest_visible_ratio"], own["p_holm"]) == (effect.smallest_visible, effect.p_adjusted)
    row = next(row for row in found["table"] if row["quantity"] == "loss" and row["arm"] == "bc")
    cell = group.table["loss"]["bc"]
    assert (row["mean"], row["mean_lower"], row["mean_upper"]) == (cell.mean.value, cell.mean.lower, cell.mean.upper)
    ratio = cell.difference.ratio
    assert (row["ratio"], row["ratio_lower"], row["ratio_upper"]) == (ratio.value, ratio.lower, ratio.upper)
    assert (row["num_seeds"], row["num_with_value"], row["baseline"], row["call"]) == (3, 3, "ac", cell.call)
    assert (row["p"], row["p_adjusted"], row["method"], row["smallest_visible_ratio"]) == (
        cell.difference.p, cell.p_adjusted, cell.difference.method, cell.difference.smallest_visible,
    )  # fmt: skip
    base = next(row for row in found["table"] if row["quantity"] == "loss" and row["arm"] == "ac")
    assert [base[key] for key in KEYS["table"][9:]] == [None] * 8
    own = comparison.calibration["peak_bytes"]
    assert found["calibration"]["peak_bytes"] == {
        "n": own.n, "median": own.median, "worst": own.worst, "worst_run": own.worst_run,
    }  # fmt: skip


# -- the page


class Outline(HTMLParser):
    """The text of each heading, list item, cell and picture of a page, and what stands in none."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.outside = [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.setdefault("img", []).append(dict(attrs)["alt"])
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.found.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in (
            "title",
            "h1",
            "h2",
            "li",
            "th",
            "td",
            "caption",
            "code",
            "strong",
            "p",
            "style",
        ):
            self.found[self.open[-1]][-1] += data
        else:
            self.outside += data.strip()


def test_a_page_has_headings_lists_tables_and_pictures_and_nothing_beside_them(entry):
    cells = [{"train.batch": 8}, {"train.batch": 16}]
    runs = [entry(arm, seed, tau=tau, cell=cell, factors={}) for cell in cells for seed in (0, 1) for arm, tau in
            (("base", 50.0), ("fast", 25.0))]  # fmt: skip
    rates = [0.1, 0.2, 0.3]
    runs += [
        replace(run, curve_steps=(0, 1), curve_losses=(3.0, run.loss)) for run in tried(entry, "base", rates, rates)
    ]
    comparison = judge(runs, command="llmeff compare it", notes=["mind this"])
    found = Outline(page(comparison, "A & B"))
    assert found.outside == ""
    assert found.found["title"] == found.found["h1"] == ["A & B"]
    assert found.found["h2"] == [
        "Curves: train.batch = 8", "Curves: train.batch = 16", "Tables", "Differences between the configs of the arms",
        "Command to reproduce this comparison",
    ]  # fmt: skip
    assert found.found["strong"] == ["train.batch = 8", "train.batch = 16"]
    assert found.found["code"] == ["llmeff compare it"]
    assert found.found["img"] == [
        "held-out loss: train.batch = 8", "tuning: train.batch = 8", "tuning budget: train.batch = 8",
        "held-out loss: train.batch = 16",
    ]  # fmt: skip
    said = [line for group in comparison.groups for line in verdicts(group)]
    assert found.found["li"] == [*said, *comparison.notes]
    shown = tables(comparison)
    assert found.found["caption"] == [
        *(table.title for table in shown), "Fields that differ (train.batch = 8)", "Fields that differ (train.batch = 16)",
    ]  # fmt: skip
    headers = [header.strip() for table in shown for header in table.headers]
    assert found.found["th"][: len(headers)] == headers
    values = [value.strip() for table in shown for row in table.rows for value in row]
    assert found.found["td"][: len(values)] == values
    assert found.found["td"][len(values) :] == ["optim.name", "base", "fast"] * 2
    assert FOOTNOTE in found.found["p"]
    assert "Again" not in Outline(page(replace(comparison, command=None), "A & B")).found["h2"]


def test_fields_that_differ_are_those_of_the_first_runs(entry):
    configs = {
        "one": {"lr": 0.00123456789, "same": 1, "only": True},
        "two": {"lr": 0.5, "same": 1},
        "three": {"lr": 0.5, "same": 1},
    }
    runs = [entry(arm, 0, config=config) for arm, config in configs.items()]
    text = Outline(page(judge(runs), "it"))
    assert text.found["caption"][-1] == "Fields that differ"
    assert text.found["th"][-4:] == ["", "one", "two", "three"]
    assert text.found["td"][-8:] == ["lr", "0.00123457", "0.5", "0.5", "only", "True", "-", "-"]


def test_a_sentence_says_how_many_came_to_what_is_spoken_of(study):
    late = [
        replace(run, curve_losses=tuple(loss + 9 for loss in run.curve_losses)) if run.arm == "same" else run
        for run in study
    ]
    (group,) = judge(late).groups
    fast, same = verdicts(group)
    assert fast.startswith("fast against base: final loss x ")
    assert f"; steps to loss {group.target:.4f} x 0." in fast
    assert f"; steps to loss {group.target:.4f}: 0 of 3 runs have a value" in same
    lost = [replace(run, arm="lost", phase="tuning", name=f"lost/{run.seed}") for run in study if run.arm == "fast"]
    assert verdicts(judge([*study, *lost]).groups[0])[-1] == "lost against base: nothing to compare"


def test_a_study_without_a_name_is_called_by_its_first_arms(entry):
    runs = [entry(f"a{number}", seed) for number in range(7) for seed in (0, 1)]
    assert title_of(runs) == "a0, a1, a2, a3, a4, a5, ..."
    assert title_of(runs[:12]) == "a0, a1, a2, a3, a4, a5"


def test_a_page_is_written_to_its_file_or_is_an_error_in_words(comparison, tmp_path):
    write_report(comparison, tmp_path / "it.html", "it")
    assert (tmp_path / "it.html").read_text(encoding="utf-8") == page(comparison, "it")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(comparison, tmp_path / "nowhere" / "it.html", "it")


def test_markdown_sets_numbers_right_and_escapes_what_would_break_it():
    table = TextTable(title="it", headers=["a", "b", "c"], rows=[["x|y", "1", "2  3"], ["\\", "", "4\n5"]])
    assert markdown(table) == "**it**\n\n| a | b | c |\n| --- | ---: | ---: |\n| x\\|y | 1 | 2 3 |\n| \\\\ |  | 4 5 |\n"
    untitled = replace(table, title="", rows=[])
    assert markdown(untitled, num_left=2) == "| a | b | c |\n| --- | --- | ---: |\n"
    assert render_tables([untitled, untitled]) == f"{markdown(untitled)}\n{markdown(untitled)}"


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (47, [["", "one", "two", "three"]]),
        (46, [["", "one", "two"], ["", "three"]]),
        (33, [["", "one"], ["", "two"], ["", "three"]]),
    ],
)
def test_a_table_that_is_too_wide_is_taken_apart_and_each_part_has_its_first_column(width, parts):
    rows = [["row", "1" * 10, "2" * 10, "3" * 10], ["last", "", "", "x"]]
    text = terminal([TextTable(title="it", headers=["", "one", "two", "three"], rows=rows)], width, "closing")
    cells = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")]
             for line in text.splitlines() if line[0] in "┃│"]  # fmt: skip
    assert [row for row in cells if row[0] == ""] == parts
    # what a part has nothing of is not in it
    assert [row[0] for row in cells] == [name for part in parts for name in ["", "row", *["last"] * ("three" in part)]]
    assert [len(line) for line in text.splitlines() if line.startswith("┏")] == [
        (1 + 7 if "three" in part else 1 + 6) + 13 * (len(part) - 1) for part in parts
    ]  # fmt: skip
    assert sum(line.strip() == "it" for line in text.splitlines()) == len(parts)
    assert text.endswith("\nclosing\n")
    assert terminal([], width, "closing") == "closing\n"
