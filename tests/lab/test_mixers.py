"""The race of mixers: what it says of times that are known, what it measures against prices, and wrong input."""

import json
import math
import re

import pytest
import torch

from llmeff.cli import main
from llmeff.core.config import ConfigError
from llmeff.lab import mixers as module
from llmeff.lab.mixers import MixerRace, bench_mixers, overtakes, picture, tables
from llmeff.models.single_layer import mixer_names
from tests.mixers import NAMES

SMALL = ("--length", "16", "--length", "32", "--length", "64", "--width", "16", "--processes", "2", "--rounds", "1")


def race(*mixers, **fields):
    return MixerRace(**{"mixers": mixers, "lengths": (16, 32, 64), "width": 16, "processes": 2, "rounds": 1} | fields)


def times(*values):
    """By length, in two processes."""
    return {2**n: [value, value] for n, value in enumerate(values, start=4)}


@pytest.mark.parametrize(
    ("own", "firsts", "expected"),
    [
        ((1, 2, 4), (2, 4, 8), 16),
        ((8, 8, 8), (1, 2, 4), None),
        ((4, 4, 4), (2, 4, 8), 32),
        ((4, 4, 4), (1, 4, 16), 32),
        ((2, 2, 2), (1, 4, 16), 16 * math.sqrt(2)),
        ((1, 9, 1), (2, 3, 3), 32 * 2 ** 0.5),
    ],
)  # fmt: skip
def test_one_overtakes_where_the_lines_cross_for_the_last_time(own, firsts, expected):
    assert overtakes(times(*own), times(*firsts)) == (None if expected is None else pytest.approx(expected))


def test_the_exponent_is_that_of_the_largest_lengths():
    found = module._exponent({16: [9.0, 1.0], 32: [1.0, 3.0], 64: [4.0, 6.0], 128: [16.0, 12.0]})
    assert (found.value, found.n) == (pytest.approx(1.5), 2)


@pytest.fixture(scope="module")
def result():
    return bench_mixers(race("softmax", "linear", "sliding window=8"))


def test_states_and_what_is_kept_for_backward_are_as_priced(result):
    for name, own in result["mixers"].items():
        for length, cell in own["lengths"].items():
            for kind in ("saved_bytes", "state_bytes", "executed_flops"):
                assert cell["measured"][kind] == cell["predicted"][kind], (name, length, kind)
            assert cell["predicted"]["peak_bytes"] == pytest.approx(cell["measured"]["peak_bytes"], rel=0.25)


def test_the_kernels_that_ran_are_told(result):
    ran = {name: {kernel for cell in own["lengths"].values() for kernel in cell["kernels"]}
           for name, own in result["mixers"].items()}  # fmt: skip
    assert ran["linear"] == {"scan: torch"}
    assert all(kernel.startswith("attention: torch sdpa, ") for kernel in ran["softmax"] | ran["sliding window=8"])


def test_only_softmax_keeps_more_the_longer_it_is(result):
    states = {name: [cell["measured"]["state_bytes"] for cell in own["lengths"].values()]
              for name, own in result["mixers"].items()}  # fmt: skip
    assert states["softmax"] == [2 * 16 * 4 * length for length in (16, 32, 64)]
    assert len(set(states["linear"])) == 1
    assert states["sliding window=8"][-1] == states["sliding window=8"][-2]


def test_the_first_is_as_fast_as_itself(result):
    for cell in result["mixers"]["softmax"]["lengths"].values():
        assert {ratio["value"] for ratio in cell["ratio"].values()} == {1.0}
        assert all(second > 0 for seconds in cell["seconds"].values() for second in seconds)
        assert {len(seconds) for seconds in cell["seconds"].values()} == {2}


def test_tables_name_mixer_names_and_the_picture_is_one(result):
    shown = tables(json.loads(json.dumps(result)))
    assert all([row[0] for row in table.rows] == list(result["mixers"]) for table in shown)
    assert picture(result).startswith(b"\x89PNG")


def test_the_decoders_own_mixer_is_what_all_are_set_beside():
    assert mixer_names()[0] == "softmax"
    assert sorted(mixer_names()) == sorted(NAMES)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--mixer", "linaer"], r"--mixer 'linaer': unknown mixer 'linaer'\. Did you mean 'linear'\?"),
        (["--mixer", "linear", "--mixer", "linear"], "--mixer: give different mixers. Given: linear, linear"),
        (["--mixer", "sliding window=0"], "--mixer 'sliding window=0': .*window"),
        (["--mixer", "sliding 'window=4"], "cannot be read"),
        (["--length", "128", "--length", "64"], "--length: give at least 3 ascending numbers of tokens, each at least 2. Given: .*"),
        (["--heads", "3"], "width 16 is not a multiple of num_heads 3|num_heads"),
        (["--mixer", "gla kernel=fla"], "--mixer 'gla kernel=fla': mixer 'gla': kernel 'fla' .* only on GPUs"),
        (["--mixer", "sliding kernel=flex"], "--mixer 'sliding kernel=flex': .* kernel 'flex' trains only on GPUs"),
        (["--processes", "1"], "--processes 1: must be at least 2"),
        pytest.param(
            ["--device", "cuda"], "--device cuda: torch sees no CUDA device; allowed here: cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device"),
        ),
        (["--out", "here.txt"], r"--out here\.txt: this command writes JSON, so give a file name that ends in \.json"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_error(capsys, wrong, words):
    assert main(["bench", "mixers", *SMALL, *wrong]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(words, error), error


def test_a_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "_work", print)
    with pytest.raises(ConfigError, match="a process of the race ended before its turns were over"):
        bench_mixers(race("softmax", "linear"))


def test_the_command_writes_json_and_a_picture(capsys, tmp_path, monkeypatch, result):
    raced = []
    monkeypatch.setattr(module, "bench_mixers", lambda race: raced.append(race) or result)
    out = tmp_path / "mixers.json"
    assert main(["bench", "mixers", *SMALL, "--mixer", "softmax", "--mixer", "linear", "--out", str(out)]) == 0
    assert "step beats softmax from" in " ".join(capsys.readouterr().out.split())
    assert raced[0] == race("softmax", "linear")
    written = json.loads(out.read_text())
    assert list(written["mixers"]) == list(result["mixers"])
    assert out.with_suffix(".png").is_file()
