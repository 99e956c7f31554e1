import json

import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.data.text import TextData

datasets = pytest.importorskip("datasets")

TEXTS = [f"row {i} ☃" for i in range(30)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


def config(path, **settings):
    source = {"name": "datasets", "path": "json", "data_files": [str(path)], "column": "body"}
    return validate(TextData, {"source": source | settings})


@pytest.mark.parametrize("streaming", [False, True])
def test_rows(path, streaming):
    documents = list(config(path, streaming=streaming).source.documents())
    assert [(d.unit, d.text) for d in documents] == [(f"train:{row}", text) for row, text in enumerate(TEXTS)]


def test_a_stream_is_read_up_to_max_tokens(path):
    data = config(path, streaming=True)
    opened = data.model_copy(update={"max_tokens": 50}).open()
    total = sum(facts.num_tokens for facts in opened.splits.values())
    assert 50 <= total < 50 + max(len(text.encode()) for text in TEXTS) + 1


def test_local_files_are_known_by_content(path, tmp_path):
    before = config(path).source.fingerprint()
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / path.name)
    assert config(moved).source.fingerprint() == before
    moved.write_text('{"body": "x"}\n')
    assert config(moved).source.fingerprint() != before


def test_a_name_on_the_hub_is_known_by_its_settings(path):
    def fingerprint(**settings):
        return validate(TextData, {"source": {"name": "datasets", "path": "a/b", **settings}}).source.fingerprint()

    seen = {fingerprint(), fingerprint(revision="c"), fingerprint(path="a/c"), fingerprint(data_files=["*.json"])}
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"column": "boddy"}, "json has no column 'boddy'. Did you mean 'body'"),
        ({"data_files": ["/nowhere/x.jsonl"]}, "datasets cannot read 'json'"),
        ({"split": "validation"}, "datasets cannot read 'json'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read(path, settings, problem, streaming):
    with pytest.raises(ConfigError, match=problem):
        list(config(path, streaming=streaming, **settings).source.documents())


def test_a_number_is_no_text(path):
    path.write_text('{"body": 1}\n')
    with pytest.raises(ConfigError, match="row 0: the column 'body' contains a value of type int, not text"):
        list(config(path).source.documents())
