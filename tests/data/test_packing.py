import itertools

import numpy as np
import pytest

from llmeff.core.config import ConfigError
from llmeff.data.cache import TokenStream
from llmeff.data.packing import MASKED, EvalWindows, TrainWindows

END = 0


def stream(*lengths):
    """Documents whose tokens are all different: the place in the stream is the token, but for end tokens."""
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    tokens = np.arange(starts[-1] + 1, dtype=np.uint16)
    tokens[starts] = END
    document_bytes = np.array(lengths) * 2
    return TokenStream(tokens, starts, document_bytes, lambda: [f"d{i}" for i in range(len(lengths))])


def decode(ids):
    return "xx" * sum(int(i) != END for i in ids)


PACKINGS = pytest.mark.parametrize("packing", ["plain", "documents"])
SHAPES = pytest.mark.parametrize(
    ("lengths", "length"), [((7, 1, 20, 3), 5), ((3, 3), 8), ((30,), 4), ((1, 1, 1, 1, 1, 1), 3), ((9,), 10)]
)


@PACKINGS
@SHAPES
class TestTraining:
    def test_any_split_of_the_rows_gives_the_same_batch(self, lengths, length, packing):
        for step in range(9):
            whole = TrainWindows(stream(*lengths), length, packing).batch(3, step, range(6), 6)
            for cuts in ([0, 2, 6], [0, 1, 2, 3, 4, 5, 6]):
                windows = TrainWindows(stream(*lengths), length, packing)
                parts = [windows.batch(3, step, range(a, b), 6) for a, b in itertools.pairwise(cuts)]
                for name in ("tokens", "targets", "positions", "documents"):
                    if getattr(whole, name) is not None:
                        joined = np.concatenate([getattr(part, name) for part in parts])
                        assert np.array_equal(joined, getattr(whole, name))

    def test_an_order_does_not_depend_on_the_batch_size(self, lengths, length, packing):
        windows = TrainWindows(stream(*lengths), length, packing)
        single = [windows.batch(0, step, range(1), 1).tokens[0] for step in range(12)]
        assert np.array_equal(single, np.concatenate([windows.batch(0, s, range(4), 4).tokens for s in range(3)]))

    def test_an_epoch_has_each_token_at_most_once(self, lengths, length, packing):
        given = stream(*lengths)
        windows = TrainWindows(given, length, packing)
        period = len(given.tokens) - 1
        for epoch in range(4):
            targets = windows.batch(1, epoch, range(windows.num_windows), windows.num_windows).targets.ravel()
            unique = targets[targets != END]
            assert len(unique) == len(set(unique.tolist()))
            assert period - targets.size < length
            assert (targets == END).sum() <= len(lengths)

    def test_targets_follow_tokens(self, lengths, length, packing):
        given = stream(*lengths)
        follower = {int(a): int(b) for a, b in zip(given.tokens, given.tokens[1:], strict=False) if a != END}
        first_tokens = {int(given.tokens[s + 1]) for s in given.starts[:-1]}
        batch = TrainWindows(given, length, packing).batch(5, 0, range(16), 16)
        assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for token, target in zip(batch.tokens.ravel().tolist(), batch.targets.ravel().tolist(), strict=True):
            assert target in first_tokens if token == END else target == follower[token]

    def test_documents_are_apart(self, lengths, length, packing):
        batch = TrainWindows(stream(*lengths), length, packing).batch(2, 0, range(16), 16)
        if packing == "plain":
            assert batch.positions is None
            assert batch.documents is None
            return
        for tokens, positions, documents in zip(batch.tokens, batch.positions, batch.documents, strict=True):
            begins = (tokens == END) | (np.arange(length) == 0)
            assert np.array_equal(np.diff(documents) != 0, begins[1:])
            runs = np.maximum.accumulate(np.where(begins, np.arange(length), 0))
            assert positions.tolist() == (np.arange(length) - runs).tolist()

    def test_units_are_the_documents_in_the_rows(self, lengths, length, packing):
        given = stream(*lengths)
        batch = TrainWindows(given, length, packing).batch(2, 0, range(3), 3)
        owner = {
            int(t): f"d{i}" for i, s in enumerate(given.starts[:-1]) for t in given.tokens[s + 1 : given.starts[i + 1]]
        }
        held = {owner[token] for token in batch.tokens.ravel().tolist() if token != END}
        first_after_end = batch.targets[(batch.tokens == END)].tolist()
        assert set(batch.units()) == held | {owner[token] for token in first_after_end}


def test_seeds_and_epochs_differ():
    windows = TrainWindows(stream(200, 300), 10, "plain")
    count = windows.num_windows
    orders = [windows.batch(seed, epoch, range(count), count).tokens for seed in range(2) for epoch in range(2)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_never_changes():
    # A change here changes what every recorded run was trained on.
    batch = TrainWindows(stream(500, 300, 199), 7, "plain").batch(11, 40, range(4), 8)
    assert batch.tokens[:, 0].tolist() == [92, 1, 933, 485]


def test_a_corpus_shorter_than_a_window():
    with pytest.raises(ConfigError, match="sequence_length is 12, but the training split has only 11 tokens"):
        TrainWindows(stream(10), 12, "plain")


@PACKINGS
@SHAPES
class TestEvaluation:
    def test_every_token_is_a_target_once(self, lengths, length, packing):
        given = stream(*lengths)
        windows = EvalWindows(given, length, packing, decode)
        batch = windows.batch(range(windows.num_windows))
        counted = batch.targets != MASKED
        assert batch.targets[counted].tolist() == given.tokens[1:].tolist()
        assert batch.tokens[counted].tolist() == given.tokens[:-1].tolist()
        assert counted.sum() == windows.num_targets == sum(lengths) + len(lengths)
        assert np.array_equal(counted, batch.target_documents >= 0)
        # The end token that closes a document is the document's.
        assert np.bincount(batch.target_documents[counted]).tolist() == [size + 1 for size in lengths]
        assert windows.document_bytes.tolist() == [2 * size for size in lengths]
        assert windows.units == [f"d{i}" for i in range(len(lengths))]

    def test_windows_are_taken_in_any_parts(self, lengths, length, packing):
        windows = EvalWindows(stream(*lengths), length, packing, decode)
        count = windows.num_windows
        whole = windows.batch(range(count))
        strided = [windows.batch(range(rank, count, 2)) for rank in range(2)]
        for rank, part in enumerate(strided):
            assert np.array_equal(part.targets, whole.targets[rank::2])
            assert np.array_equal(part.target_documents, whole.target_documents[rank::2])
            assert part.positions is None or np.array_equal(part.positions, whole.positions[rank::2])

    def test_documents_are_apart(self, lengths, length, packing):
        windows = EvalWindows(stream(*lengths), length, packing, decode)
        batch = windows.batch(range(windows.num_windows))
        if packing == "plain":
            assert batch.documents is None
            return
        counted = batch.targets != MASKED
        assert np.array_equal(batch.documents[counted], batch.target_documents[counted])
        assert (batch.documents[~counted] == -1).all()
        assert (batch.positions[counted & (batch.tokens == END)] == 0).all()
        assert (batch.positions >= 0).all()
        assert batch.positions.max() < length

    @pytest.mark.parametrize("max_tokens", [1, 2, 6, 8, 9, 10**6])
    def test_a_limit_counts_only_what_is_evaluated(self, lengths, length, packing, max_tokens):
        given = stream(*lengths)
        windows = EvalWindows(given, length, packing, decode, max_tokens)
        targets = given.tokens[1:][:max_tokens].tolist()
        batch = windows.batch(range(windows.num_windows))
        assert batch.targets[batch.targets != MASKED].tolist() == targets
        assert windows.document_bytes.sum() == 2 * sum(token != END for token in targets)
        assert len(windows.units) == len(windows.document_bytes) == batch.target_documents.max() + 1
