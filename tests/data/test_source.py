import gzip
import json
import os
import shutil

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from llmeff.core.config import ConfigError, validate
from llmeff.data import builtin, source
from llmeff.data.builtin import Builtin
from llmeff.data.jsonl import JsonLines
from llmeff.data.parquet import Parquet
from llmeff.data.text_files import TextFiles

TEXTS = ["Grüße\r\n", "", 'a "quoted" line\nand another', "☃" * 3000]


def lines(texts=TEXTS):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def read(config):
    return [(document.unit, document.text) for document in config.documents()]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"second\r\n")
    (folder / "a.txt").write_bytes("fürst".encode())
    (folder / "deep" / "c.txt").write_bytes(b"third")
    (folder / "notes.md").write_bytes(b"# not a .txt")
    return folder


def test_a_folder_gives_its_files_in_order_with_relative_names(corpus):
    assert read(TextFiles(path=(str(corpus),))) == [
        ("a.txt", "fürst"),
        ("b.txt", "second\r\n"),
        ("deep/c.txt", "third"),
    ]


@pytest.mark.parametrize(
    ("paths", "units"),
    [
        (["notes.md"], ["notes.md"]),
        (["*.txt"], ["a.txt", "b.txt"]),
        (["**/c.txt", "a.txt", "a.txt"], ["a.txt", "deep/c.txt"]),
        (["**/*.txt"], ["a.txt", "b.txt", "deep/c.txt"]),
        (["deep"], ["c.txt"]),
    ],
)
def test_files_and_globs(corpus, paths, units):
    config = TextFiles(path=tuple(str(corpus / path) for path in paths))
    assert [unit for unit, _ in read(config)] == units


def test_a_single_path_needs_no_list(corpus):
    config = validate(TextFiles, {"path": str(corpus / "a.txt"), "name": "text"})
    assert read(config) == [("a.txt", "fürst")]
    assert validate(TextFiles, json.loads(config.model_dump_json())) == config


def test_given_splits(corpus):
    config = validate(TextFiles, {"by_split": {"train": str(corpus / "deep"), "test": [str(corpus / "a.txt")]}})
    assert [(d.split, d.unit) for d in config.documents()] == [("train", "deep/c.txt"), ("test", "a.txt")]


def test_a_separator_divides_a_file(corpus):
    (corpus / "a.txt").write_text("one<end>two<end>")
    config = TextFiles(path=(str(corpus / "a.txt"),), separator="<end>")
    assert read(config) == [("a.txt:0", "one"), ("a.txt:1", "two"), ("a.txt:2", "")]


class TestFingerprint:
    def test_moves_with_the_folder(self, corpus, tmp_path):
        before = TextFiles(path=(str(corpus),)).fingerprint()
        shutil.move(corpus, tmp_path / "elsewhere")
        assert TextFiles(path=(str(tmp_path / "elsewhere"),)).fingerprint() == before

    def test_changes_with_content_names_splits_and_reading(self, corpus):
        path = (str(corpus),)
        seen = {TextFiles(path=path).fingerprint(), TextFiles(path=path, separator="e").fingerprint()}
        seen.add(TextFiles(by_split={"test": path}).fingerprint())
        (corpus / "a.txt").write_bytes(b"other")
        seen.add(TextFiles(path=path).fingerprint())
        (corpus / "a.txt").rename(corpus / "z.txt")
        seen.add(TextFiles(path=path).fingerprint())
        assert len(seen) == 5

    def test_a_small_file_is_hashed_each_time_whatever_its_time_says(self, corpus):
        config, file = TextFiles(path=(str(corpus),)), corpus / "a.txt"
        file.write_bytes(b"a" * 100_000)
        before, state = config.fingerprint(), file.stat()
        file.write_bytes(b"b" * 100_000)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert config.fingerprint() != before

    def test_a_large_file_is_hashed_once(self, corpus, monkeypatch):
        monkeypatch.setattr(source, "REMEMBERED_BYTES", 1)
        config = TextFiles(path=(str(corpus),))
        before = config.fingerprint()
        monkeypatch.setattr(source.files, "sha256", None)
        assert config.fingerprint() == before
        monkeypatch.undo()
        assert config.fingerprint() == before

    def test_a_large_file_that_changed_is_hashed_again(self, corpus, monkeypatch, cache_folder):
        monkeypatch.setattr(source, "REMEMBERED_BYTES", 1)
        config = TextFiles(path=(str(corpus),))
        before = config.fingerprint()
        (corpus / "a.txt").write_bytes(b"other")
        assert config.fingerprint() != before
        assert not any("corpus" in file.read_text() for file in cache_folder.rglob("*.json"))


class TestJsonLines:
    @pytest.fixture(params=["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "two.jsonl.zst", "two.jsonl.gz"])
    def path(self, request, tmp_path):
        compress = {
            "jsonl": lambda content: content,
            "gz": gzip.compress,
            "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
        }[request.param.rpartition(".")[2]]
        path = tmp_path / request.param
        halves = [lines(TEXTS[:2]), lines(TEXTS[2:])] if request.param.startswith("two") else [lines()]
        path.write_bytes(b"".join(map(compress, halves)))
        return path

    def test_compressed_or_not(self, path):
        expected = [(f"{path.name}:{number}", text) for number, text in enumerate(TEXTS, start=1)]
        assert read(JsonLines(path=(str(path),))) == expected

    def test_another_field_and_empty_lines(self, tmp_path):
        (tmp_path / "c.jsonl").write_text('{"body": "one"}\n\n  \n{"body": "two"}')
        assert read(JsonLines(path=(str(tmp_path),), field="body")) == [("c.jsonl:1", "one"), ("c.jsonl:4", "two")]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            (b'{"txt": "x", "id": 1}', r"line 2: there is no field 'text'. Did you mean 'txt'\? Known: id, txt"),
            (b'{"text": 5}', "line 2: the field 'text' contains a value of type int"),
            (b'{"text": null}', "line 2: the field 'text' contains a value of type NoneType"),
            (b'["text"]', "line 2: expected a JSON object, found list"),
            (b'{"text": ', "line 2: is not JSON"),
            (b'{"text": "\xff"}', r"line 2: is not UTF-8 \(invalid byte at index 10\)"),
            (b'{"text": "\\ud800"}', "line 2: .* surrogate"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, problem):
        (tmp_path / "c.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
        with pytest.raises(ConfigError, match="c.jsonl, " + problem):
            read(JsonLines(path=(str(tmp_path),)))

    @pytest.mark.parametrize("suffix", ["gz", "zst"])
    def test_a_file_that_is_cut_or_not_compressed(self, tmp_path, suffix):
        path = tmp_path / f"c.jsonl.{suffix}"
        path.write_bytes(lines())
        with pytest.raises(ConfigError, match=str(path)):
            read(JsonLines(path=(str(path),)))
        whole = gzip.compress(lines()) if suffix == "gz" else pa.compress(lines(), "zstd", asbytes=True)
        path.write_bytes(whole[:-20])
        with pytest.raises(ConfigError, match=str(path)):
            read(JsonLines(path=(str(path),)))


class TestParquet:
    def write(self, path, columns):
        write_table(pa.table(columns), path, row_group_size=2)
        return str(path)

    def test_rows(self, tmp_path):
        path = self.write(tmp_path / "c.parquet", {"id": [1, 2, 3, 4], "body": TEXTS})
        assert read(Parquet(path=(path,), column="body")) == [(f"c.parquet:{row}", t) for row, t in enumerate(TEXTS)]

    @pytest.mark.parametrize(
        ("columns", "problem"),
        [
            ({"texts": ["x"]}, "there is no column 'text'. Did you mean 'texts'"),
            ({"text": ["x", "y", None]}, "row 2: the column 'text' contains a value of type NoneType"),
            ({"text": [1]}, "row 0: the column 'text' contains a value of type int"),
        ],
    )
    def test_a_bad_column(self, tmp_path, columns, problem):
        path = self.write(tmp_path / "c.parquet", columns)
        with pytest.raises(ConfigError, match=problem):
            read(Parquet(path=(path,)))

    def test_another_file(self, tmp_path):
        (tmp_path / "c.parquet").write_text("text")
        with pytest.raises(ConfigError, match="is not a Parquet file"):
            read(Parquet(path=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lambda folder: TextFiles(path=(f"{folder}/none.txt",)), "there is no file .*none.txt"),
        (lambda folder: TextFiles(path=(f"{folder}/*.rst",)), r"no file matches .*\*.rst"),
        (lambda folder: Parquet(path=(str(folder),)), "no file below .* ends in .parquet"),
        (lambda folder: JsonLines(path=(f"{folder}/a.txt",)), "'jsonl' reads only files that end in .jsonl"),
        (lambda folder: TextFiles(path=(f"{folder}/deep/d.jsonl.gz",)), "For this file, use the source 'jsonl'"),
        (
            lambda folder: TextFiles(path=(f"{folder}/latin.txt",)),
            r"latin.txt: is not UTF-8 \(invalid byte at index 2\)",
        ),
    ],
)
def test_wrong_files(corpus, config, problem):
    (corpus / "latin.txt").write_bytes(b"gr\xfcn")
    shutil.copy(corpus / "a.txt", corpus / "deep" / "d.jsonl.gz")
    with pytest.raises(ConfigError, match=problem):
        read(config(corpus))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "either path"),
        ({"path": "a", "by_split": {"train": "a"}}, "either path"),
        ({"by_split": {"trian": "a"}}, "'validation'"),
        ({"path": 3}, "path"),
    ],
)
def test_wrong_settings(given, problem):
    with pytest.raises(ConfigError, match=problem):
        validate(TextFiles, given)


class TestBuiltin:
    def test_is_the_library_without_tests_and_packages(self):
        units = [unit for unit, _ in read(Builtin())]
        assert {"json/decoder.py", "os.py"} <= set(units)
        assert not any(unit.startswith(("site-packages", "test/")) or "/tests/" in unit for unit in units)
        assert len(units) == len(set(units)) > 500

    def test_of_a_folder_it_takes_the_modules_alone(self, tmp_path, monkeypatch):
        taken = ["a.py", "json/b.py", "tested.py", "unittest/c.py"]
        left = ["a.pyc", "notes.txt", "sitecustomize.py", "_sysconfigdata_linux.py", "config-3.12/d.py"]
        left += [f"{folder}/d.py" for folder in ("site-packages", "dist-packages", "test", "json/tests", "idle_test")]
        left += ["__pycache__/d.py", "empty.py", "latin.py"]
        for name in taken + left:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"this is {name}")
        (tmp_path / "empty.py").write_text("")
        (tmp_path / "latin.py").write_bytes(b"\xff")
        monkeypatch.setattr(builtin.sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
        assert sorted(read(Builtin())) == [(name, f"this is {name}") for name in taken]

    def test_a_limit_takes_the_first_files(self):
        documents = read(Builtin())
        first = read(Builtin(max_bytes=300_000))
        assert first == documents[: len(first)]
        assert sum(len(text.encode()) for _, text in first) <= 300_000
        assert sum(len(text.encode()) for _, text in documents[: len(first) + 1]) > 300_000

    def test_fingerprint(self):
        assert Builtin().fingerprint() == Builtin().fingerprint() != Builtin(max_bytes=300_000).fingerprint()
