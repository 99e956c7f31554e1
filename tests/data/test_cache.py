import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from llmeff.core.config import ConfigError
from llmeff.data import cache, verified_cache
from llmeff.data.byte_tokenizer import Bytes
from llmeff.data.splits import Document

ensure = partial(verified_cache.ensure, kind=cache.KIND)
TOKENIZER = Bytes().build(list)
DOCUMENTS = [
    ("train", Document(unit="a", text="one")),
    ("test", Document(unit="line\nbreak", text="zwölf")),
    ("train", Document(unit="b", text="three")),
]


def writer(documents=DOCUMENTS, max_tokens=None):
    return lambda folder: cache.write_corpus(folder, documents, TOKENIZER, max_tokens)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "tokens" / "key"


@pytest.fixture
def made(folder):
    ensure(folder, writer())
    return folder


def refuse(folder):
    raise AssertionError("made again")


def test_holds_what_was_given(made):
    tokens = cache.TokenCache(made)
    train, test = tokens.stream("train"), tokens.stream("test")
    assert train.tokens.tolist() == [256, *b"one", 256, *b"three", 256]
    assert train.tokens.dtype == np.uint16
    assert train.starts.tolist() == [0, 4, 10]
    assert train.document_bytes.tolist() == [3, 5]
    assert train.units == ["a", "b"]
    assert test.tokens.tolist() == [256, *"zwölf".encode(), 256]
    assert test.units == ["line\nbreak"]
    assert tokens.splits["train"] == cache.SplitFacts(
        num_documents=2, num_tokens=10, num_bytes=8, gzip_bits_per_byte=None
    )
    assert tokens.splits["test"].gzip_bits_per_byte > 8


def test_large_vocabularies_have_wide_tokens(folder):
    class Wide(type(TOKENIZER)):
        def __init__(self):
            super().__init__(TOKENIZER.backend)
            self.vocab_size = 2**16 + 1

        def encode_batch(self, texts):
            return [np.full(len(text), 2**16, dtype=np.uint32) for text in texts]

    ensure(folder, lambda part: cache.write_corpus(part, DOCUMENTS, Wide(), None))
    assert cache.TokenCache(folder).stream("train").tokens[:5].tolist() == [256, 65536, 65536, 65536, 256]


def test_documents_encoded_together_are_the_same(folder, made, monkeypatch):
    monkeypatch.setattr(cache, "ENCODED_CHARACTERS", 1)
    other = folder.with_name("other")
    ensure(other, writer())
    assert cache.TokenCache(other).fingerprint == cache.TokenCache(made).fingerprint


@pytest.mark.parametrize(
    ("max_tokens", "units"), [(1, ["a"]), (4, ["a"]), (5, ["a"]), (12, ["a", "b"]), (99, ["a", "b"])]
)
def test_max_tokens_ends_with_the_document_that_reaches_it(folder, max_tokens, units):
    ensure(folder, writer(max_tokens=max_tokens))
    assert cache.TokenCache(folder).stream("train").units == units


def test_a_whole_cache_is_not_made_again(made):
    ensure(made, refuse)


def all_files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "train.tokens").unlink(),
        lambda folder: (folder / "train.starts").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: os.truncate(folder / "test.tokens", 3),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "train.units.jsonl").write_text('"x"\n"y"\n'),
    ],
)
def test_a_damaged_cache_is_set_aside_and_made_again(made, harm, caplog):
    whole = all_files(made)
    harm(made)
    damaged = all_files(made)
    ensure(made, writer())
    assert all_files(made) == whole
    assert "the token cache is damaged" in caplog.text
    (aside,) = made.parent.glob("damaged-*")
    assert all_files(aside) == damaged


def test_an_error_leaves_nothing(folder):
    def fail():
        yield DOCUMENTS[0]
        raise ConfigError("line 2 is bad")

    with pytest.raises(ConfigError, match="line 2 is bad"):
        ensure(folder, writer(fail()))
    assert list(folder.parent.iterdir()) == []


def test_no_text_is_an_error(folder):
    with pytest.raises(ConfigError, match="there is no text in it"):
        ensure(folder, writer([]))


def test_a_full_disk_is_one_error_and_leaves_nothing(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    documents = [("train", Document(unit=str(i), text="x" * 10_000)) for i in range(20)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"cannot be written \(File too large\): free some space, or set LLMEFF_CACHE"
        ):
            ensure(folder, writer(documents))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(folder.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        ensure(tmp_path / "file" / "tokens" / "key", writer())


def test_another_process_that_was_faster_wins(folder):
    def write(part):
        writer()(part)
        if not folder.exists():
            other = folder.with_name("other")
            ensure(other, writer())
            other.rename(folder)

    ensure(folder, write)
    ensure(folder, refuse)
    assert [entry.name for entry in folder.parent.iterdir()] == ["key"]


KILLED = """
import os, signal, sys
from pathlib import Path
from llmeff.data import cache, verified_cache
from llmeff.data.byte_tokenizer import Bytes
from llmeff.data.splits import Document

def documents():
    for i in range(2_000_000):
        yield "train", Document(unit=str(i), text="x" * 1000)
        if i == 3000:
            os.kill(os.getpid(), signal.SIGKILL)

write = lambda folder: cache.write_corpus(folder, documents(), Bytes().build(list), None)
verified_cache.ensure(Path(sys.argv[1]), write, cache.KIND)
"""


def test_a_killed_writer_leaves_nothing_that_is_read(folder):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (part,) = folder.parent.iterdir()
    assert (part / "train.tokens").stat().st_size > 0
    ensure(folder, writer())
    assert cache.TokenCache(folder).stream("train").units == ["a", "b"]
    assert part.exists()  # its writer might live
    old = time.time() - verified_cache.ABANDONED_S - 1
    for entry in (*part.iterdir(), part):
        os.utime(entry, (old, old))
    shutil.rmtree(folder)
    ensure(folder, writer())
    assert not part.exists()


def test_meta_names_no_place_on_the_machine(made, tmp_path):
    assert str(tmp_path) not in (made / "meta.json").read_text()
    assert json.loads((made / "meta.json").read_text())["format"] == cache.FORMAT
