"""Longer windows than a model's own: what is repeated, by brute force; the same loss as the run's; wrong input."""

import json
import math
import re

import numpy as np
import pytest

from llmeff.cli import main
from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.data.packing import EvalBatch
from llmeff.lab.long_range import FINE, as_json, long_range, picture, repeated, tables
from llmeff.models import Decoder
from llmeff.record.reader import read_run
from llmeff.run.loop import train
from tests.run.test_loop import TINY


def batch(tokens, documents=None):
    """Rows whose last token is only a target."""
    tokens = np.array(tokens)
    return EvalBatch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=None,
        documents=None if documents is None else np.array(documents), units=list, target_documents=np.zeros(0),
    )  # fmt: skip


def test_a_bigram_is_repeated_from_its_second_time_on():
    found = repeated(batch([[1, 2, 3, 1, 2, 2, 2, 2]]), 2)
    assert found.tolist() == [[False, False, False, True, False, True, True]]


def test_documents_know_nothing_of_one_another():
    tokens, documents = [[1, 2, 1, 2, 1, 2, 1]], [[0, 0, 0, 1, 1, 1]]
    # 1 2 | 2 1 | 1 2 again, and then 2 1, 1 2, 2 1 of the second document, whose first begins anew
    assert repeated(batch(tokens, documents), 2).tolist() == [[False, False, True, False, False, True]]


@pytest.mark.parametrize("gram", [2, 3, 5])
def test_what_is_repeated_by_brute_force(gram):
    rng = np.random.default_rng(gram)
    tokens = rng.integers(2, size=(4, 24))
    documents = np.sort(rng.integers(3, size=(4, 23)), axis=1)
    expected = np.zeros((4, 23), dtype=bool)
    for row in range(4):
        before = set()
        for t in range(gram - 2, 23):
            own = documents[row, t - gram + 2 : t + 1]
            run = (int(own[-1]), *tokens[row, t - gram + 2 : t + 2].tolist())
            if own[0] == own[-1]:
                expected[row, t] = run in before
                before.add(run)
    assert np.array_equal(repeated(batch(tokens, documents), gram), expected)
    assert expected.any()


def test_no_run_is_longer_than_a_window():
    assert not repeated(batch([[1, 1, 1]]), 4).any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of softmax with documents one after another and apart, and of a mixer with a state."""
    folder = tmp_path_factory.mktemp("context")
    settings = {"stream": ["data.packing=plain"], "apart": ["data.packing=documents"],
                "state": ["data.packing=plain", "model.mixer=gated-deltanet"]}  # fmt: skip
    for name, own in settings.items():
        train(validate(RunConfig, override(TINY, [*own])), folder / name)
    return folder


@pytest.mark.parametrize("name", ["stream", "apart", "state"])
def test_at_the_training_length_the_loss_is_the_runs(runs, name):
    ((found,),) = [[each.lengths[0] for each in long_range([runs / name], times=1, max_tokens=10**9)]]
    recorded = read_run(runs / name).result.metrics["validation"]["loss"]
    assert found.all.loss == pytest.approx(recorded, rel=1e-5)


def test_positions_and_kinds_of_tokens_add_up(runs):
    (found,) = long_range([runs / "stream"], times=4, gram=3)
    for own in found.lengths:
        assert own.repeated.count + own.other.count == own.all.count
        parts = [mean.loss * mean.count for mean in (own.repeated, own.other) if mean.count]
        assert sum(parts) == pytest.approx(own.all.loss * own.all.count)
        assert own.tokens_per_s > 0
    assert [own.length for own in found.lengths] == [found.training_length * n for n in (1, 2, 4)]
    assert len(found.positions) == 4 * FINE
    last = found.lengths[-1].all
    assert sum(mean.count for _, mean in found.positions) == last.count
    assert sum(mean.loss * mean.count for _, mean in found.positions if mean.count) == pytest.approx(
        last.loss * last.count
    )


def test_more_is_repeated_in_longer_windows(runs):
    (found,) = long_range([runs / "stream"], times=4)
    shares = [own.repeated.count / own.all.count for own in found.lengths]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_runs_that_differ_in_their_seed_are_one_arm(runs, tmp_path):
    for seed in (1, 2):
        train(validate(RunConfig, override(TINY, ["data.packing=plain", f"seed={seed}"])), tmp_path / f"seed-{seed}")
    found = long_range([tmp_path / "seed-1", runs / "state", tmp_path / "seed-2"], times=1)
    first, other, second = [each.arm for each in found]
    assert first == second == found[0].run != other == found[1].run
    assert (found[0].run.split("/")[-1], found[2].run.split("/")[-1]) == ("seed-1", "seed-2")
    losses = [found[0].lengths[0].all.loss, found[2].lengths[0].all.loss]
    shown = {row[0].partition(",")[0]: row for row in tables(found)[0].rows}
    mean, interval = shown[first][2].split(" ", 1)
    assert float(mean) == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert "to" in interval
    assert shown[first][1] == "2"
    assert " " not in shown[other][2]


def test_a_name_that_one_arm_has_names_it(tmp_path):
    for name, settings in {"a": ["name=mine"], "b": ["name=mine", "seed=1"], "c": ["name=yours"]}.items():
        train(validate(RunConfig, override(TINY, settings)), tmp_path / name)
    assert [each.arm for each in long_range([tmp_path / name for name in "abc"], times=1)] == ["mine", "mine", "yours"]


def test_token_frequencies_are_those_of_the_training_text(runs):
    (found,) = long_range([runs / "stream"], times=1, max_tokens=1000)
    corpus = validate(RunConfig, override(TINY, ["data.packing=plain"])).data.open()
    train, held_out = (corpus.stream(split).tokens.tolist() for split in ("train", "validation"))
    total = len(train) + corpus.vocab_size
    losses = [-math.log((train.count(token) + 1) / total) for token in held_out[1:1001]]
    assert found.unigram_loss == pytest.approx(sum(losses) / len(losses))


def test_decoding_keeps_what_a_state_takes(runs):
    softmax, state = long_range([runs / "stream", runs / "state"], times=4)
    first, *_, last = softmax.lengths
    assert last.state_bytes == 4 * first.state_bytes > 0
    assert len({own.state_bytes for own in state.lengths}) == 1


def test_tables_json_and_picture(runs):
    found = long_range([runs / "stream", runs / "state"], times=2)
    length = found[0].training_length
    arms = [f"{name}, {n * length} ({n} x)" for name in ("stream", "state") for n in (1, 2)]
    assert [row[0] for row in tables(found)[0].rows] == [*arms, "token frequencies"]
    assert [each["run"] for each in json.loads(json.dumps(as_json(found), allow_nan=False))["runs"]] == [
        "stream",
        "state",
    ]
    assert picture(found).startswith(b"\x89PNG")


def test_the_command_writes_what_it_found(capsys, runs, tmp_path):
    out = tmp_path / "found.json"
    assert main(["context", str(runs / "stream"), "--times", "2", "--out", str(out)]) == 0
    assert "of repeated" in " ".join(capsys.readouterr().out.split())
    assert json.loads(out.read_text())["runs"][0]["run"] == "stream"
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--times", "3"], "--times 3: must be a power of 2"),
        (["--gram", "1"], "--gram 1: must be at least 2"),
        (["--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (
            ["--max-tokens", "40"],
            r"--max-tokens 40: .* was trained on windows of \d+ tokens, so a window of 4 times that length needs",
        ),
        (["--split", "validaton"], r"--split 'validaton': there is no such split\. Did you mean 'validation'\?"),
        (["--times", "1048576"], "has [0-9]+ tokens, but a window of 1048576 times the training length"),
        (["--out", "x.csv"], r"--out x\.csv: this command writes JSON"),
    ],
)
def test_wrong_input_is_one_error(capsys, runs, wrong, words):
    assert main(["context", str(runs / "stream"), *wrong]) == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def test_a_run_given_twice_is_an_error(capsys, runs):
    assert main(["context", str(runs / "stream"), str(runs / "state" / ".." / "stream")]) == 2
    assert "stream: this run is given twice" in " ".join(capsys.readouterr().err.split())


def test_runs_of_other_text_are_an_error(capsys, runs, tmp_path):
    train(validate(RunConfig, override(TINY, ["data.source.max_bytes=90000"])), tmp_path / "other")
    assert main(["context", str(runs / "stream"), str(tmp_path / "other")]) == 2
    assert "use different texts or tokenizers" in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_a_model_is_an_error(capsys, tmp_path):
    assert main(["context", str(tmp_path)]) == 2
    assert "is not a run folder" in " ".join(capsys.readouterr().err.split())


def test_a_wrong_run_among_others_is_an_error_before_any_is_read(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "forward", None)
    with pytest.raises(ConfigError, match="is not a run folder"):
        long_range([runs / "stream", tmp_path])


def test_runs_of_different_training_lengths_make_one_picture(runs, tmp_path):
    train(validate(RunConfig, override(TINY, ["data.sequence_length=30"])), tmp_path / "short")
    found = long_range([runs / "stream", tmp_path / "short"], times=2)
    assert [len(each.positions) for each in found] == [2 * FINE, 2 * FINE]
    for each in found:
        assert sum(mean.count for _, mean in each.positions) == each.lengths[-1].all.count
    assert picture(found).startswith(b"\x89PNG")
