"""Files are whole or absent, whatever goes wrong; what goes wrong is one clear error."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from llmeff.core import files
from llmeff.core.config import ConfigError

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a"
    files.write_text(path, "old")
    with files.new_file(path) as part:
        part.write_text("n")
        assert path.read_text() == "old"
        part.write_text("ñew")
    assert path.read_bytes() == "ñew".encode()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()])
def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    files.write_text(path, "old")

    def write():
        with files.new_file(path) as part:
            part.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_once_it_is_full(tmp_path):
    path = tmp_path / "a"
    with files.new_folder(path) as part:
        (part / "below").mkdir()
        (part / "below" / "b").write_text("x")
        assert not path.exists()
    assert (path / "below" / "b").read_text() == "x"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    def write():
        with files.new_folder(tmp_path / "a") as part:
            (part / "b").write_text("x")
            raise error

    with pytest.raises(type(error)):
        write()
    assert os.listdir(tmp_path) == []


def test_a_folder_takes_no_others_place(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(OSError, match="not empty"), files.new_folder(path) as part:
        (part / "b").touch()
    assert os.listdir(path) == ["mine"]
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_are_swept_at_any_depth_and_nothing_else_is(tmp_path):
    for name in ("kept", "model", f"{files.PARTIAL}folder"):
        (tmp_path / name).mkdir()
    for name in (
        "model/weights",
        f"model/{files.PARTIAL}weights",
        f"{files.PARTIAL}folder/{files.PARTIAL}b",
        "partial",
    ):
        (tmp_path / name).touch()
    files.sweep_partial(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        "kept", "model", "model/weights", "partial",
    }  # fmt: skip


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_failed_write_is_one_error_with_advice_where_there_is_one(tmp_path, number):
    with pytest.raises(ConfigError) as raised, files.reported(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / 'a'}: cannot be written ({os.strerror(number)}).")
    assert ("--resume" in text) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_what_safetensors_meets_is_reported_too(tmp_path):
    message = r"cannot be written \(No such file or directory\)"
    with pytest.raises(ConfigError, match=message), files.reported(tmp_path / "a"):
        save_file({"a": torch.zeros(2)}, tmp_path / "nowhere" / "a")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("nothing of the system's")])
def test_what_is_no_failed_write_is_not_disguised(tmp_path, error):
    with pytest.raises(type(error), match=str(error)), files.reported(tmp_path):
        raise error
