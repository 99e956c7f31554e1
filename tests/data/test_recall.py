"""Questions about what stood before: every answer stands in its row, whatever is drawn."""

import numpy as np
import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.data.packing import MASKED
from llmeff.data.recall import RecallData


def data(**fields):
    return validate(RecallData, fields)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("pairs", "length"), [(1, 4), (4, 16), (4, 64), (16, 64), (16, 128)])
def test_every_key_is_asked_for_once_and_its_value_stood_behind_it(pairs, length, noise):
    config = data(pairs=pairs, sequence_length=length, noise=noise)
    given = config.train_rows(3, 5, range(20))
    assert given.tokens.shape == given.targets.shape == (20, length)
    for tokens, targets in zip(given.tokens, given.targets, strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs
        assert 0 < keys.min() <= keys.max() < 128 <= values.min() <= values.max() < 256
        asked = np.flatnonzero(targets != MASKED)
        assert sorted(tokens[asked]) == sorted(keys)
        assert {int(tokens[t]): int(targets[t]) for t in asked} == dict(
            zip(keys.tolist(), values.tolist(), strict=True)
        )
        assert asked.min() >= 2 * pairs
        assert np.diff(asked).min(initial=2) >= 2
        if not noise:
            assert not np.delete(tokens, [*range(2 * pairs), *asked]).any()


def test_questions_come_near_the_pairs_unless_all_distances_are_alike():
    def mean_place(recency):
        given = data(recency=recency, sequence_length=128).train_rows(0, 0, range(200))
        return np.nonzero(given.targets != MASKED)[1].mean()

    assert mean_place(0.01) < 45
    assert mean_place(1.0) == pytest.approx(16 + 111 / 2, abs=3)


def test_induction_asks_for_what_followed_the_call():
    given = data(kind="induction", vocab_size=16, sequence_length=32).train_rows(0, 0, range(50))
    for tokens, targets in zip(given.tokens, given.targets, strict=True):
        (called, end) = np.flatnonzero(tokens == 0)
        assert end == 31
        assert targets[-1] == tokens[called + 1]
        assert (targets[:-1] == MASKED).all()


def test_rows_are_a_function_of_seed_step_and_row():
    config = data()
    whole = config.train_rows(1, 2, range(8)).tokens
    assert np.array_equal(config.train_rows(1, 2, range(3, 8)).tokens, whole[3:])
    others = (
        config.train_rows(2, 2, range(8)),
        config.train_rows(1, 3, range(8)),
        config.held_out_rows("test", range(8)),
    )
    assert not any(np.array_equal(other.tokens, whole) for other in others)
    assert config.fingerprint() != data(seed=1).fingerprint()


def test_a_seed_draws_these_rows():
    """Where they are others, `_DRAWING` must count on."""
    mqar = data(vocab_size=16, pairs=2, sequence_length=12).train_rows(0, 1, range(1))
    induction = data(kind="induction", vocab_size=8, sequence_length=6).held_out_rows("test", range(1))
    assert mqar.tokens.tolist() == [[7, 13, 5, 8, 7, 13, 5, 0, 13, 0, 5, 10]]
    assert induction.tokens.tolist() == [[7, 1, 5, 0, 4, 0]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 17}, "vocab_size is 17, but 8 pairs need an even number of at least 18"),
        (
            {"pairs": 17},
            "sequence_length is 64, but 17 pairs and 17 questions, with a free token after each question, "
            "need at least 68",
        ),
        ({"kind": "induction", "vocab_size": 2}, "induction needs a vocab_size"),
        ({"kind": "induction", "pairs": 4}, "pairs is 4, but induction does not use pairs: leave it out"),
        ({"kind": "induction", "noise": False}, "noise is False, but induction does not use noise"),
        ({"kind": "mqr"}, "kind"),
    ],
)
def test_what_does_not_fit_is_said(fields, words):
    with pytest.raises(ConfigError, match=words):
        data(**fields)
