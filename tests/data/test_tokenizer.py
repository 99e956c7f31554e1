import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmeff.core.config import ConfigError, validate
from llmeff.data.bpe import Bpe
from llmeff.data.byte_tokenizer import Bytes
from llmeff.data.character_tokenizer import Characters
from llmeff.data.hf_tokenizer import HfTokenizer
from llmeff.data.tokenizer import END

TEXT = "def f(x):\n    return 'é☃' + x  # 12345 <b>\r\n\t  héllo wörld\x00"
DATA = Path(os.environ.get("LLMEFF_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def gpt2_folder(tmp_path):
    """A folder as GPT-2 has it: vocab.json and merges.txt alone."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    model = json.loads(Bpe(vocab_size=300).build(lambda: [TEXT * 20]).backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] | {END: len(model["vocab"])}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    return folder


@pytest.fixture(params=["bytes", "characters", "bpe", "hf"])
def config(request, gpt2_folder):
    return {
        "bytes": Bytes(),
        "characters": Characters(),
        "bpe": Bpe(vocab_size=300),
        "hf": HfTokenizer(path=str(gpt2_folder)),
    }[request.param]


@pytest.fixture
def tokenizer(config):
    return config.build(lambda: [TEXT, TEXT[::-1]])


def test_text_survives(tokenizer):
    texts = [TEXT, "", TEXT[5:9], "x\n"]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(ids.dtype.kind == "u" and (ids < tokenizer.vocab_size).all() for ids in encoded)
    assert tokenizer.decode([tokenizer.end_id, *encoded[0], tokenizer.end_id]) == TEXT


def test_the_vocabulary_is_foretold_or_is_the_texts(config, tokenizer):
    foretold = config.vocabulary()
    assert (foretold is None) == (config.name == "characters")
    assert foretold is None or foretold >= tokenizer.vocab_size
    assert config.name not in ("bytes", "hf") or foretold == tokenizer.vocab_size


def test_our_way_to_encode_equals_the_saved_tokenizer(tokenizer):
    encoded = tokenizer.backend.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode_batch([TEXT])[0].tolist() == encoded


def test_the_end_of_a_document_is_written_as_gpt2_writes_it():
    """Other programs that read a saved tokenizer look for it."""
    assert END == "<|endoftext|>"


def test_saved_and_loaded(config, tokenizer, folder):
    tokenizer.save(folder)
    loaded = config.load(folder)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    text = TEXT if config.name == "characters" else TEXT + END
    assert loaded.encode_batch([text])[0].tolist() == tokenizer.encode_batch([text])[0].tolist()


def test_auto_tokenizer_is_the_same(tokenizer, folder):
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # must not decide the class
    auto = AutoTokenizer.from_pretrained(folder)
    assert auto(TEXT).input_ids == tokenizer.encode_batch([TEXT])[0].tolist()
    assert auto.decode(auto(TEXT).input_ids) == TEXT
    assert len(auto) == tokenizer.vocab_size
    assert (auto.eos_token, auto.eos_token_id) == (END, tokenizer.end_id)
    assert auto("x" + END).input_ids[-1] == tokenizer.end_id


def test_bytes_are_their_own_ids():
    tokenizer = Bytes().build(list)
    assert tokenizer.encode_batch([TEXT])[0].tolist() == list(TEXT.encode())
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.decode(np.array([0x68, 0xFF])) == "h\ufffd"


def test_characters_are_in_order_and_closed():
    tokenizer = Characters().build(lambda: ["banana\n", "cab"])
    assert tokenizer.encode_batch(["\nabcn"])[0].tolist() == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == 6
    with pytest.raises(ConfigError, match=r"the character 'é' \(U\+00E9\) is not in the training text"):
        tokenizer.encode_batch(["ab", "né"])


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_no_text_becomes_the_end_token(name):
    tokenizer = (Bytes() if name == "bytes" else Bpe(vocab_size=260)).build(lambda: [TEXT])
    ids = tokenizer.encode_batch([f"a{END}b"])[0]
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == f"a{END}b"


def test_bpe_is_trained_alike_and_only_on_the_first_bytes():
    config = Bpe(vocab_size=280, training_bytes=len(TEXT.encode()) + 1)
    texts = [TEXT, TEXT[::-1], "zqzqzqzqzqzqzq" * 9]
    first = config.build(lambda: texts)
    assert first.fingerprint() == config.build(lambda: iter(texts)).fingerprint()
    assert first.fingerprint() == config.build(lambda: texts[:2]).fingerprint()
    assert first.fingerprint() != Bpe(vocab_size=280).build(lambda: texts).fingerprint()


def test_bpe_merges_what_is_frequent():
    tokenizer = Bpe(vocab_size=270).build(lambda: ["the cat and the hat " * 50])
    assert 257 < tokenizer.vocab_size <= 270
    assert len(tokenizer.encode_batch([" the"])[0]) == 1


@pytest.mark.parametrize("field", ["vocab_size", "training_bytes"])
def test_bpe_settings_change_the_fingerprint(field):
    assert Bpe().fingerprint() != Bpe(**{field: 5000}).fingerprint()


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(ConfigError, match="greater than or equal to 257"):
        validate(Bpe, {"vocab_size": 256})


class TestFolder:
    def test_other_end_token(self, gpt2_folder):
        config = HfTokenizer(path=str(gpt2_folder), end_token="A")
        assert config.build(list).end_id == config.build(list).backend.token_to_id("A")
        assert config.fingerprint() != HfTokenizer(path=str(gpt2_folder)).fingerprint()

    def test_words_and_numbers_are_cut_apart_before_anything_is_merged(self, folder):
        (folder / "vocab.json").write_text(json.dumps({"1": 0, "a": 1, "1a": 2, "11": 3, END: 4}))
        (folder / "merges.txt").write_text("#version: 0.2\n1 a\n1 1\n")
        tokenizer = HfTokenizer(path=str(folder)).build(list)
        assert tokenizer.encode_batch(["1a11a"])[0].tolist() == [0, 1, 3, 1]

    def test_ids_with_gaps_need_the_largest(self, folder):
        Bpe(vocab_size=300).build(lambda: [TEXT]).save(folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"]["zz"] = 5000
        file.write_text(json.dumps(content))
        assert HfTokenizer(path=str(folder)).build(list).vocab_size == 5001

    def test_padding_and_truncation_are_left_out(self, folder):
        tokenizer = Bpe(vocab_size=300).build(lambda: [TEXT])
        expected = [ids.tolist() for ids in tokenizer.encode_batch([TEXT, "x"])]
        tokenizer.backend.enable_truncation(2)
        tokenizer.backend.enable_padding(length=99)
        tokenizer.save(folder)
        built = HfTokenizer(path=str(folder)).build(list)
        assert [ids.tolist() for ids in built.encode_batch([TEXT, "x"])] == expected

    def test_a_chat_template_is_kept(self, gpt2_folder, folder):
        (gpt2_folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
        HfTokenizer(path=str(gpt2_folder)).build(list).save(folder)
        message = [{"role": "user", "content": "hi"}]
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(message, tokenize=False) == "hi!"

    @pytest.mark.parametrize(
        ("files", "problem"),
        [
            ({}, "there is neither a tokenizer.json nor a vocab.json with merges.txt"),
            ({"vocab.json": "{}"}, "there is neither a tokenizer.json"),
            ({"tokenizer.json": "{"}, "the tokenizer cannot be read"),
            ({"tokenizer_config.json": "{"}, "tokenizer_config.json: is not JSON"),
        ],
    )
    def test_wrong_folders(self, folder, files, problem):
        for name, content in files.items():
            (folder / name).write_text(content)
        with pytest.raises(ConfigError, match=problem):
            HfTokenizer(path=str(folder)).build(list)

    def test_no_folder(self):
        with pytest.raises(ConfigError, match="there is no folder nowhere"):
            HfTokenizer(path="nowhere").fingerprint()

    def test_no_end_token(self, gpt2_folder):
        (gpt2_folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        with pytest.raises(ConfigError, match="the end token '</s>' is not in the vocabulary"):
            HfTokenizer(path=str(gpt2_folder)).build(list)


@pytest.mark.skipif(not (DATA / "models" / "stories260K").is_dir(), reason=f"no models/stories260K in {DATA}")
def test_a_foreign_tokenizer_is_kept(folder):
    path = DATA / "models" / "stories260K"
    config = HfTokenizer(path=str(path), end_token="<s>")
    tokenizer = config.build(list)
    tokenizer.save(folder)
    text = "once upon a time, lily said."
    theirs, ours = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(folder)
    assert ours(text).input_ids == theirs(text).input_ids
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_batch([text])[0].tolist()
    assert ours.eos_token == theirs.eos_token
    assert tokenizer.end_id == config.load(folder).end_id == theirs.bos_token_id
