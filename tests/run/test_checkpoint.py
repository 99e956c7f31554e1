"""Checkpoints: the last few whole ones are there, whatever fails and whenever; a damaged one is never read."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.run.checkpoint import Checkpoint, Checkpoints, restore_random_states


def write(folder):
    save_file({"a": torch.arange(4.0)}, folder / "weights.safetensors")


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, {"items_seen": 10 * step}, write)


def test_what_is_saved_is_found(checkpoints):
    save(checkpoints, 3)
    found = checkpoints.newest()
    assert found == Checkpoint(folder=checkpoints.folder / "step-00000003", step=3, state={"items_seen": 30})
    assert (found.folder / "weights.safetensors").is_file()


def test_nothing_saved_is_nothing_found(checkpoints):
    assert checkpoints.newest() is None


@pytest.mark.parametrize(("keep", "kept"), [(1, [100]), (2, [20, 100]), (3, [3, 20, 100]), (9, [1, 3, 20, 100])])
def test_the_last_few_are_kept(tmp_path, keep, kept):
    checkpoints = Checkpoints(tmp_path, keep)
    save(checkpoints, 1, 3, 20, 100)
    assert names(checkpoints) == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_a_write_that_fails_leaves_the_older_ones_and_no_trace(checkpoints, monkeypatch, error, moment):
    save(checkpoints, 1, 2)

    def fail(*_args):
        raise error

    def half(folder):
        write(folder)
        fail()

    owner, name = (files, "sync") if moment == "sync" else (type(checkpoints.folder), "rename")
    with monkeypatch.context() as patch:
        if moment != "write":
            patch.setattr(owner, name, fail)
        with pytest.raises((ConfigError, KeyboardInterrupt)) as raised:
            checkpoints.save(3, {}, half if moment == "write" else write)
    assert names(checkpoints) == ["step-00000001", "step-00000002"]
    assert checkpoints.newest().step == 2
    if isinstance(raised.value, ConfigError):
        assert "step-00000003: cannot be written (No space left on device)" in str(raised.value)


def test_older_ones_go_only_once_the_new_one_is_whole(checkpoints, monkeypatch):
    save(checkpoints, 1, 2)
    seen = []
    rmtree = shutil.rmtree

    def watched(path, *args, **kwargs):
        seen.append((path.name, checkpoints.newest().step))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(checkpoints, 3)
    assert seen == [(".partial-step-00000001", 3)]


def test_what_a_killed_process_left_is_swept_and_never_found(checkpoints):
    save(checkpoints, 1)
    left = checkpoints.folder / f"{files.PARTIAL}step-00000002-0123abcd"
    shutil.copytree(checkpoints.folder / "step-00000001", left)
    assert checkpoints.newest().step == 1
    save(checkpoints, 3)
    assert names(checkpoints) == ["step-00000001", "step-00000003"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def other_format(path):
    manifest = json.loads(path.read_text()) | {"schema_version": 99}
    path.write_text(json.dumps(manifest))


DAMAGES = {
    "a flipped bit": ("weights.safetensors", flip, "weights.safetensors does not match its checksum"),
    "a flipped bit in the state": ("state.json", flip, "state.json does not match its checksum"),
    "a flipped bit in the random states": (
        "rng-00000.safetensors",
        flip,
        "rng-00000.safetensors does not match its checksum",
    ),
    "a cut file": ("weights.safetensors", cut, "weights.safetensors does not match its checksum"),
    "an empty file": ("state.json", lambda path: path.write_bytes(b""), "state.json does not match its checksum"),
    "a missing file": ("weights.safetensors", os.remove, "No such file or directory"),
    "a missing manifest": ("manifest.json", os.remove, "No such file or directory"),
    "a cut manifest": ("manifest.json", cut, "Expecting"),
    "an empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "Expecting value"),
    "a manifest of another format": (
        "manifest.json",
        other_format,
        "its format version is 99, but this llmeff reads version 2",
    ),
}


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(checkpoints, caplog, name, damage, reason):
    save(checkpoints, 1, 2)
    damage(checkpoints.folder / "step-00000002" / name)
    with caplog.at_level("WARNING", logger="llmeff"):
        assert checkpoints.newest().step == 1
    assert len(caplog.records) == 1
    assert "checkpoint step-00000002 is damaged, so it is skipped: " in caplog.text
    assert reason in caplog.text


def test_where_all_are_damaged_none_is_found(checkpoints):
    save(checkpoints, 1, 2)
    for name in names(checkpoints):
        flip(checkpoints.folder / name / "weights.safetensors")
    assert checkpoints.newest() is None


def test_a_whole_one_is_not_written_again(checkpoints):
    save(checkpoints, 1)
    manifest = checkpoints.folder / "step-00000001" / "manifest.json"
    before = manifest.stat()
    save(checkpoints, 1)
    after = manifest.stat()  # its time of reading may move, and does where a day has passed
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_one_is_set_aside_for_a_whole_one_of_its_step(checkpoints):
    save(checkpoints, 1, 2)
    flip(checkpoints.folder / "step-00000002" / "weights.safetensors")
    save(checkpoints, 2)
    assert checkpoints.newest().step == 2
    aside, *others = names(checkpoints)
    assert aside.startswith("damaged-step-00000002-")
    assert others == ["step-00000001", "step-00000002"]


def test_a_damaged_one_of_a_later_step_drives_out_no_whole_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 4)
    flip(tmp_path / "step-00000004" / "weights.safetensors")
    save(checkpoints, 2)
    assert checkpoints.newest().step == 2


def test_random_numbers_go_on_where_they_were(checkpoints):
    torch.manual_seed(5)
    save(checkpoints, 1)
    expected = torch.rand(3)
    torch.manual_seed(6)
    restore_random_states(checkpoints.newest())
    assert torch.equal(torch.rand(3), expected)


def test_checkpoints_that_cannot_be_read_are_no_reason_to_begin_anew(tmp_path):
    from llmeff.core.config import ConfigError

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.resume_point("") is None
    place = tmp_path / "checkpoints" / "step-00000004"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text('{"schema_version": 99, "sha256": {}}')
    with pytest.raises(ConfigError, match="no checkpoint in this folder can be read"):
        checkpoints.resume_point("")


@pytest.mark.parametrize(("then", "is_refused"), [("a" * 64, False), ("b" * 64, True), (None, False)])
def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, then, is_refused):
    from llmeff.core.config import ConfigError

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(4, {} if then is None else {"data": then}, write)
    if is_refused:
        with pytest.raises(
            ConfigError, match=r"was made with different data .SHA-256 bbbbbbbbbbbb... then, aaaaaaaaaaaa... now"
        ):
            checkpoints.resume_point("a" * 64)
    else:
        assert checkpoints.resume_point("a" * 64).step == 4


def test_what_a_killed_process_did_not_prune_goes_when_the_last_one_is_saved_again(tmp_path):
    save(Checkpoints(tmp_path, keep=9), 1, 2, 3, 4)
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 4)
    assert names(checkpoints) == ["step-00000003", "step-00000004"]
