import itertools

import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.data.splits import SPLITS, Document, SplitConfig

HALVES = SplitConfig(calibration=0.1, search=0.2, validation=0.1, test=0.1)


def documents(count):
    return [Document(unit=str(i), text=f"document {i} ") for i in range(count)]


def assigned(config, given):
    return [(split, part) for document in given for split, part in config.assign(document)]


def test_each_document_falls_in_one_split_in_the_asked_shares():
    found = assigned(HALVES, documents(4000))
    assert [part for _, part in found] == documents(4000)
    shares = {split: sum(one == split for one, _ in found) / 4000 for split in SPLITS}
    assert shares == pytest.approx(
        {"train": 0.5, "calibration": 0.1, "search": 0.2, "validation": 0.1, "test": 0.1}, abs=0.03
    )


def test_equal_texts_fall_together_whatever_their_names():
    for document in documents(50):
        twin = Document(unit="another name", text=document.text)
        assert [split for split, _ in HALVES.assign(document)] == [split for split, _ in HALVES.assign(twin)]


def test_the_test_split_does_not_depend_on_the_other_fractions():
    def held_out(config):
        return {part.unit for split, part in assigned(config, documents(500)) if split == "test"}

    assert held_out(HALVES) == held_out(SplitConfig(calibration=0.0, search=0.0, validation=0.5, test=0.1))


def test_spans_are_the_document_in_order():
    config = HALVES.model_copy(update={"by": "span"})
    text = "".join(chr(0x4E00 + i) for i in range(1003))
    parts = list(config.assign(Document(unit="a", text=text)))
    assert [split for split, _ in parts] == list(SPLITS)
    assert "".join(part.text for _, part in parts) == text
    assert {part.unit for _, part in parts} == {"a"}


@pytest.mark.parametrize("length", [10, 1_115_394, 1_234_567])
def test_nine_tenths_are_exact(length):
    config = SplitConfig(by="span", calibration=0.0, search=0.0, validation=0.1, test=0.0)
    parts = dict(config.assign(Document(unit="a", text="x" * length)))
    assert {split: len(part.text) for split, part in parts.items()} == {
        "train": length * 9 // 10,
        "validation": length - length * 9 // 10,
    }


@pytest.mark.parametrize("by", ["document", "span"])
def test_a_given_split_is_kept(by):
    document = Document(unit="a", text="abc", split="search")
    assert list(SplitConfig(by=by).assign(document)) == [("search", document)]


@pytest.mark.parametrize("by", ["document", "span"])
def test_an_empty_document_is_in_no_split(by):
    assert list(SplitConfig(by=by).assign(Document(unit="a", text=""))) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"validation": 0.5, "test": 0.5},
            "search, validation and test must sum to less than 1: the rest is the training split",
        ),
        ({"validation": 1.5}, "validation"),
        ({"valid": 0.1}, "validation"),
        ({"by": "file"}, "'document' or 'span'"),
    ],
)
def test_bad_fractions(given, problem):
    with pytest.raises(ConfigError, match=problem):
        validate(SplitConfig, given)


def test_shares_sum_to_one():
    for values in itertools.product([0.0, 0.1, 0.07], repeat=4):
        config = SplitConfig(**dict(zip(SPLITS[1:], values, strict=True)))
        assert sum(config.shares().values()) == 1
