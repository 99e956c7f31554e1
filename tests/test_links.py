"""Nothing inside a folder that llmeff writes is followed out of it: what leads elsewhere is refused, and nothing is touched."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llmeff.cli import main
from llmeff.compare.ledger import JOB_FILE, RUNS
from llmeff.config.sweep import SweepConfig
from llmeff.core import files
from llmeff.core.config import ConfigError, override, validate
from llmeff.lab.jobs import final_jobs
from llmeff.lab.slurm import write_slurm
from llmeff.lab.sweep import Sweep, open_sweep
from llmeff.lab.timing import write_timing
from llmeff.parallel.watchdog import FOLDER, Watchdog
from llmeff.record.reader import read_run
from llmeff.record.writer import RunWriter, check_free, lock
from llmeff.run.checkpoint import Checkpoints
from llmeff.run.loop import Trainer, train
from tests.lab.test_sweep import SMALL
from tests.run.test_loop import tiny

LEADS = ("to a file", "to a folder", "nowhere")
NOT_YET = (
    FOLDER, f"{FOLDER}/rank-00000.json", f"{FOLDER}/rank-00000.part", f"{FOLDER}/told", "engine.log", "engine-00000.log",
    "samples.png", ".partial-config.json-0123abcd", "discarded-1", "checkpoints/.partial-step-00000006",
    "checkpoints/step-00000006", "model/below/deeper/link", "model/.partial-config.json-0123abcd",
)  # fmt: skip
"""What a run of several ranks, a killed one, or the next steps would write beside what lies in a run folder now."""


def state(folder):
    """All below a folder, not through links: kinds, contents, and when files were written."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            key, stat = path.relative_to(folder).as_posix(), path.lstat()
            if path.is_symlink():
                found[key] = os.readlink(path)
            elif path.is_file():
                found[key] = (path.read_bytes(), stat.st_mtime_ns, stat.st_mode)
            else:
                found[key] = stat.st_mode
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run that was all but finished: it lacks its result alone."""
    folder = tmp_path_factory.mktemp("links") / "run"
    train(tiny(), folder)
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def begun(written, tmp_path):
    folder = tmp_path / "place" / "run"
    shutil.copytree(written, folder)
    return folder


@pytest.fixture
def outside(tmp_path):
    """Somebody's folder, which holds what a run folder and a checkpoint hold."""
    folder = tmp_path / "outside"
    (folder / "step-00000002").mkdir(parents=True)
    for name in ("thesis.tex", "metrics.jsonl", ".partial-notes", "rank-00000.json", "step-00000002/manifest.json"):
        (folder / name).write_text(f"mine: {name}\n")
    return folder


def target(outside, leads):
    return {"to a file": outside / "thesis.tex", "to a folder": outside, "nowhere": outside / "new"}[leads]


def every_link(folder, outside, leads, more=()):
    """Puts a link in the place of each thing in a folder in turn, and takes it away again."""
    names = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} | set(more))
    for name in names:
        path, aside = folder / name, folder.parent / "aside"
        parents = [own for own in path.parents if folder in own.parents and not own.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        is_there = path.exists()
        if is_there:
            path.rename(aside)
        path.symlink_to(target(outside, leads))
        yield name
        assert path.is_symlink(), name
        path.unlink()
        if is_there:
            aside.rename(path)
        for own in parents:
            own.rmdir()


GOING_ON = {
    "train --resume": lambda folder: train(tiny(), folder, resume=True),
    "train anew": lambda folder: train(tiny(), folder, anew=True),
    "either": lambda folder: train(tiny(), folder, resume=True, anew=True),
    "a writer": lambda folder: RunWriter.resume(folder, tiny(), None),
    "a writer anew": lambda folder: RunWriter.restart(folder, tiny(), None),
}


@pytest.mark.parametrize("leads", LEADS)
@pytest.mark.parametrize("go_on", GOING_ON.values(), ids=GOING_ON)
def test_a_run_with_a_link_in_its_folder_does_not_go_on(begun, outside, leads, go_on):
    theirs, number = state(outside), 0
    for name in every_link(begun, outside, leads, NOT_YET):
        mine = state(begun)
        with pytest.raises(ConfigError, match=r"symbolic link|no run to resume"):
            go_on(begun)
        assert state(outside) == theirs, name
        assert state(begun) == mine, name
        number += 1
    assert number > len(NOT_YET) + 15


@pytest.mark.parametrize(
    "flags", [["--resume"], ["--restart-from-scratch"], ["--resume", "--restarts=2"]], ids=" ".join
)
def test_the_command_line_names_the_link_and_starts_nothing(begun, outside, flags, capsys, monkeypatch):
    monkeypatch.setattr("llmeff.run.launch._Job", None)
    (begun / FOLDER).symlink_to(outside)
    mine, theirs = state(begun), state(outside)
    assert main(["train", *flags, f"--out={begun}"]) == 2
    assert f"{begun / FOLDER}: is a symbolic link to {outside}. llmeff follows no links" in capsys.readouterr().err
    assert (state(begun), state(outside)) == (mine, theirs)


@pytest.mark.parametrize("leads", LEADS)
@pytest.mark.parametrize("name", [".lock", "env.json", ".partial-config.json-0123abcd", "config.json", "engine.log"])
def test_a_run_begins_in_no_folder_with_a_link(tmp_path, outside, leads, name):
    folder, theirs = tmp_path / "run", state(outside)
    folder.mkdir()
    (folder / name).symlink_to(target(outside, leads))
    mine = state(folder)
    for begin in (check_free, lambda own: RunWriter.create(own, tiny(), None), lambda own: train(tiny(), own)):
        with pytest.raises(ConfigError):
            begin(folder)
        assert (state(folder), state(outside)) == (mine, theirs)


def test_the_run_folder_itself_may_be_reached_by_a_link(begun, tmp_path):
    storage = tmp_path / "storage"
    begun.rename(storage)
    (tmp_path / "runs").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "run").symlink_to(storage, target_is_directory=True)
    assert train(tiny(), tmp_path / "runs" / "run", resume=True).status == "finished"
    assert (tmp_path / "run").is_symlink()
    assert read_run(storage).result.status == "finished"


def test_a_link_that_comes_while_a_run_goes_on_is_not_saved_through(tmp_path, outside):
    folder, theirs = tmp_path / "run", state(outside)
    with Trainer(tiny(), folder, resume=False, is_silent=True) as trainer:
        trainer.train_step()
        trainer.train_step()
        (folder / "checkpoints").symlink_to(outside, target_is_directory=True)
        with pytest.raises(ConfigError, match="symbolic link"):
            trainer.save_if_due()
    assert state(outside) == theirs


def test_neither_beats_nor_pruning_nor_locks_go_through_a_link(tmp_path, outside, monkeypatch):
    theirs = state(outside)
    for name in (FOLDER, "checkpoints"):
        (tmp_path / name).symlink_to(outside, target_is_directory=True)
    (tmp_path / ".lock").symlink_to(outside / "new")
    monkeypatch.setenv("WORLD_SIZE", "2")
    watchdog = Watchdog(tmp_path, 10.0)
    watchdog._thread = object()
    with pytest.raises(ConfigError, match="symbolic link"):
        watchdog.settle()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="symbolic link"):
        Checkpoints(tmp_path / "checkpoints", keep=1).save(4, {}, lambda part: None)
    with pytest.raises(ConfigError, match="cannot be written"):
        lock(tmp_path)
    assert state(outside) == theirs


@pytest.fixture
def swept(written, tmp_path):
    """A sweep's folder with a run in each place, and all that lies beside."""
    arms = {name: {"settings": [f"optim={name}"]} for name in ("adamw", "muon")}
    sweep = validate(SweepConfig, override(SMALL | {"arms": arms, "seeds": [0]}, []))
    folder = tmp_path / "place" / "sweep"
    open_sweep(sweep, folder)
    write_slurm(sweep, folder, modules=[], more=[])
    for job in final_jobs(sweep, folder):
        own = folder / RUNS / job.path
        shutil.copytree(written, own)
        for name in (f"{own.name}.json", f"{own.name}.log", f"{own.name}{JOB_FILE}", "chosen.json"):
            (own.parent / name).write_text("{}")
    for name in ("ledger.parquet", "timing.json", ".lock"):
        (folder / name).write_text("")
    return sweep, folder


@pytest.mark.parametrize("leads", LEADS)
def test_a_sweep_with_a_link_in_its_folder_does_not_go_on(swept, outside, leads):
    (sweep, folder), theirs = swept, state(outside)
    going_on = [
        lambda own: own.run(),
        lambda own: own.run_one("final", 0),
        lambda _: write_timing(sweep, folder, modules=[], command=""),
        lambda _: write_slurm(sweep, folder, modules=[], more=[]),
    ]
    for number, name in enumerate(every_link(folder, outside, leads)):
        mine = state(folder)
        with pytest.raises(ConfigError, match=r"symbolic link|contains no sweep|there is no sweep"):
            going_on[number % 4](Sweep(sweep, folder, cores=1, modules=[], command="", tell=print))
        assert state(outside) == theirs, name
        assert state(folder) == mine, name


# -- the parts that do it


@pytest.mark.parametrize("itself", [False, True])
def test_a_folder_may_be_a_link_where_its_user_made_it(tmp_path, itself):
    (tmp_path / "storage").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "storage")
    if itself:
        with pytest.raises(ConfigError, match="symbolic link"):
            files.refuse_links(tmp_path / "run", itself=True)
    else:
        files.refuse_links(tmp_path / "run")


def test_what_is_no_file_is_refused_and_a_folder_that_is_not_there_is_not(tmp_path):
    files.refuse_links(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: is neither a file nor a folder"):
        files.refuse_links(tmp_path)


def test_a_hard_link_is_not_written_through(tmp_path, outside):
    theirs = state(outside)
    for name, open_it in (("appended", files.open_to_append), ("new", files.open_anew)):
        os.link(outside / "thesis.tex", tmp_path / name)
        with open(open_it(tmp_path / name), "ab") as file:
            file.write(b"more")
        assert state(outside) == theirs
    assert (tmp_path / "appended").read_text() == "mine: thesis.tex\nmore"
    assert (tmp_path / "new").read_text() == "more"


def test_a_symbolic_link_is_not_opened(tmp_path, outside):
    theirs = state(outside)
    for number, place in enumerate((outside / "thesis.tex", outside / "new")):
        link = tmp_path / str(number)
        link.symlink_to(place)
        with pytest.raises(OSError, match="symbolic links"):
            files.open_to_append(link)
        os.close(files.open_anew(link))
        assert not link.is_symlink()
    assert state(outside) == theirs


def test_a_run_whose_rows_are_a_hard_link_leaves_the_other_name_as_it_is(make_run, step_row, environment, outside):
    from tests.conftest import SeedOnly

    folder = make_run("run", steps=2, is_finished=False)
    os.link(folder / "metrics.jsonl", outside / "backup.jsonl")
    theirs = state(outside)
    with RunWriter.resume(folder, SeedOnly(), environment) as writer:
        writer.truncate_after(2)
        writer.step(step_row(3))
    assert read_run(folder).steps["step"].tolist() == [1, 2, 3]
    assert state(outside) == theirs


def test_leftovers_that_are_links_go_without_what_they_lead_to(tmp_path, outside):
    theirs, folder = state(outside), tmp_path / "run"
    (folder / "below").mkdir(parents=True)
    for name in (".partial-a", "below/.partial-b", "kept"):
        (folder / name).symlink_to(outside)
    files.sweep_partial(folder)
    assert sorted(os.listdir(folder)) == ["below", "kept"]
    assert os.listdir(folder / "below") == []
    assert state(outside) == theirs


@pytest.mark.parametrize("name", ["", "train.tokens", "meta.json"])
@pytest.mark.parametrize("leads", LEADS)
def test_a_cache_that_is_a_link_or_holds_one_is_made_again(tmp_path, outside, name, leads):
    from llmeff.data.verified_cache import ensure

    def write(folder):
        (folder / "train.tokens").write_text("tokens")
        (folder / "meta.json").write_text(json.dumps({"made": "here"}))

    entry, theirs = tmp_path / "cache" / "entry", state(outside)
    entry.parent.mkdir()
    if name:
        ensure(entry, write, "token cache")
        (entry / name).unlink()
    (entry / name).symlink_to(target(outside, leads))
    ensure(entry, write, "token cache")
    assert not entry.is_symlink()
    assert (entry / "train.tokens").read_text() == "tokens"
    assert not [path for path in entry.rglob("*") if path.is_symlink()]
    assert state(outside) == theirs
