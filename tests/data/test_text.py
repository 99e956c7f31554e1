import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.data import text as module
from llmeff.data.packing import MASKED
from llmeff.data.splits import Document
from llmeff.data.text import TextData

DATA = Path(os.environ.get("LLMEFF_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def corpus(tmp_path):
    """Sixty small documents as JSON Lines."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}: {'wörd ' * (i % 7 + 1)}"}) + "\n" for i in range(60)))
    return path


def config(path, **settings):
    splits = {"calibration": 0.1, "search": 0.1, "validation": 0.2, "test": 0.2}
    given = {"source": {"name": "jsonl", "path": str(path)}, "splits": splits, "sequence_length": 16}
    return validate(TextData, given | settings)


def test_dumped_and_read_again(corpus):
    data = config(corpus, tokenizer={"name": "bpe", "vocab_size": 300})
    assert validate(TextData, json.loads(data.model_dump_json())) == data


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", {"name": "bpe", "vocab_size": 290}])
def test_the_splits_are_the_documents(corpus, tokenizer):
    data = config(corpus, tokenizer=tokenizer, splits={"by": "span"} if tokenizer == "characters" else {})
    opened = data.open()
    found = [
        opened.tokenizer.decode(stream.tokens[start:end])
        for split in opened.splits
        for stream in [opened.stream(split)]
        for start, end in zip(stream.starts[:-1], stream.starts[1:], strict=True)
    ]
    whole = [document.text for document in data.source.documents()]
    assert sum(map(len, found)) == sum(map(len, whole))
    if data.splits.by == "document":
        assert sorted(found) == sorted(whole)
    assert sum(facts.num_bytes for facts in opened.splits.values()) == len("".join(whole).encode())


def test_splits_share_no_document(corpus):
    opened = config(corpus).open()
    units = [unit for split in opened.splits for unit in opened.stream(split).units]
    assert len(opened.splits) == 5
    assert len(units) == len(set(units)) == 60


class TestCache:
    def test_a_warm_start_reads_and_trains_nothing(self, corpus, monkeypatch):
        data = config(corpus, tokenizer={"name": "bpe", "vocab_size": 290})
        cold = data.open()
        monkeypatch.setattr(type(data.source), "documents", None)
        monkeypatch.setattr(type(data.tokenizer), "build", None)
        warm = data.open()
        assert warm.fingerprint == cold.fingerprint
        assert warm.tokenizer.fingerprint() == cold.tokenizer.fingerprint()
        assert np.array_equal(warm.batch(0, 3, range(4), 4).tokens, cold.batch(0, 3, range(4), 4).tokens)

    def test_what_decides_the_tokens_decides_the_place(self, corpus, cache_folder):
        settings = [
            {},
            {"tokenizer": "characters", "splits": {"by": "span"}},
            {"splits": {"validation": 0.3}},
            {"max_tokens": 200},
        ]
        opened = [config(corpus, **setting).open() for setting in settings]
        assert len(list((cache_folder / "tokens").iterdir())) == len({one.fingerprint for one in opened}) == 4

    def test_windows_share_a_cache(self, corpus, cache_folder):
        for setting in ({}, {"sequence_length": 8}, {"packing": "documents"}):
            config(corpus, **setting).open()
        assert len(list((cache_folder / "tokens").iterdir())) == 1

    def test_another_process_waits_and_reads(self, corpus):
        data = config(corpus)
        made = []
        opened = data.open(is_main=False, wait=lambda: made.append(data.open()))
        assert opened.fingerprint == made[0].fingerprint

    def test_the_others_are_let_go_when_the_main_process_fails(self, tmp_path, corpus):
        (tmp_path / "bad.jsonl").write_text("{")
        waited = []
        with pytest.raises(ConfigError, match="is not JSON"):
            config(tmp_path / "bad.jsonl").open(wait=lambda: waited.append(True))
        assert waited
        with pytest.raises(ConfigError, match="see the error of the main process"):
            config(corpus).open(is_main=False)


ALPHABET = "abcdefghijklmnopqrstuvwxyzäöü☃🙂"


@pytest.mark.parametrize("tokenizer", ["characters", {"name": "bpe", "vocab_size": 290}])
def test_a_source_without_end_is_read_as_far_as_max_tokens_asks(corpus, monkeypatch, tokenizer):
    data = config(corpus, tokenizer=tokenizer, splits={"by": "span"}, max_tokens=1000)
    read = []

    def documents(source):
        for i in itertools.count():
            read.append(i)
            yield Document(unit=str(i), text=ALPHABET * 2 if i else ALPHABET)

    monkeypatch.setattr(type(data.source), "documents", documents)
    opened = data.open()
    assert sum(facts.num_tokens for facts in opened.splits.values()) >= 1000
    assert len(read) < (1000 + 8000) / len(ALPHABET)


def test_a_tokenizer_knows_all_that_max_tokens_lets_in(corpus, monkeypatch):
    data = config(corpus, tokenizer="characters", splits={"by": "span"}, max_tokens=100)
    texts = ["🙂" * 98, "z", "y" * 20_000, "x"]
    documents = [Document(unit=str(i), text=text, split="train") for i, text in enumerate(texts)]
    monkeypatch.setattr(type(data.source), "documents", lambda source: iter(documents))
    opened = data.open()
    assert opened.splits["train"].num_documents == 2
    assert opened.tokenizer.decode(opened.stream("train").tokens) == "🙂" * 98 + "z"
    assert opened.vocab_size == 4  # y, z, the smile and the end: x comes after enough bytes


def test_losses_in_bits_per_byte(corpus):
    opened = config(corpus).open()
    windows = opened.eval_windows("validation", length=13)
    batch = windows.batch(range(windows.num_windows))
    counted = batch.targets != MASKED
    # A model that gives each of the 257 tokens the same probability.
    sums = np.bincount(batch.target_documents[counted], weights=np.full(counted.sum(), math.log(257)))
    expected = [(size + 1) * math.log2(257) / size for size in opened.stream("validation").document_bytes]
    assert (sums / math.log(2) / windows.document_bytes).tolist() == pytest.approx(expected)


def test_a_cut_document_counts_the_bytes_of_its_part(corpus):
    opened = config(corpus, tokenizer={"name": "bpe", "vocab_size": 290}).open()
    stream = opened.stream("validation")
    for max_tokens in (1, 7, int(stream.starts[1]), int(stream.starts[1]) + 5):
        windows = opened.eval_windows("validation", max_tokens=max_tokens)
        part = opened.tokenizer.decode(stream.tokens[: max_tokens + 1])
        assert windows.document_bytes.sum() == len(part.encode())


@pytest.mark.parametrize(
    ("settings", "use", "problem"),
    [
        (
            {"splits": {"validation": 0.0}},
            lambda c: c.eval_windows("validation"),
            "the split 'validation' is empty",
        ),
        (
            {"sequence_length": 10_000},
            lambda c: c.batch(0, 0, range(1), 1),
            "sequence_length is 10000, but the training",
        ),
        ({}, lambda c: c.check_vocabulary(256), "model.vocab_size is 256, but the tokenizer 'bytes' has ids up to 256"),
    ],
)
def test_what_cannot_be_asked(corpus, settings, use, problem):
    with pytest.raises(ConfigError, match=problem):
        use(config(corpus, **settings).open())


def test_a_vocabulary_that_is_large_enough(corpus):
    config(corpus).open().check_vocabulary(257)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"source": "builtins"}, "unknown source 'builtins'. Did you mean 'builtin'"),
        ({"tokenizer": "character"}, "unknown tokenizer 'character'. Did you mean 'characters'"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"packing": "none"}, "'plain' or 'documents'"),
        ({"max_token": 5}, "max_token: there is no such field. Did you mean 'max_tokens'"),
    ],
)
def test_wrong_settings(corpus, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        config(corpus, **settings)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="there is no text in"):
        validate(TextData, {"source": {"name": "text", "path": str(tmp_path / "empty.txt")}}).open()


def test_the_builtin_corpus_needs_nothing():
    data = validate(TextData, {"source": {"name": "builtin", "max_bytes": 400_000}, "splits": {"validation": 0.3}})
    opened = data.open()
    assert opened.name == "builtin"
    assert opened.vocab_size == module.Bytes().build(list).vocab_size
    assert opened.batch(0, 0, range(8), 8).tokens.shape == (8, 256)
    assert 1 < opened.splits["validation"].gzip_bits_per_byte < 4


SHAKESPEARE = DATA / "text" / "tinyshakespeare" / "input.txt"


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"no text/tinyshakespeare in {DATA}")
def test_tinyshakespeare_is_cut_as_the_yardstick_cuts_it():
    splits = {"by": "span", "calibration": 0.0, "search": 0.0, "validation": 0.1, "test": 0.0}
    source = {"name": "text", "path": str(SHAKESPEARE)}
    opened = validate(TextData, {"source": source, "tokenizer": "characters", "splits": splits}).open()
    assert {split: facts.num_tokens - 1 for split, facts in opened.splits.items()} == {
        "train": 1003854,
        "validation": 111540,
    }
    assert opened.vocab_size == 65 + 1
