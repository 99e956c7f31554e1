"""The resume gate: killed by SIGKILL at any moment and resumed, a run is bit for bit the run that was not killed."""

import functools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from llmeff.config.run import RunConfig
from llmeff.core.config import validate
from llmeff.record.reader import read_run
from tests import mixers

STEPS = 14
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["llmeff.run.loop", "accelerate", "matplotlib.figure"])


TASKS = {
    "text": {
        "model": {"name": "decoder", "width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 32},
        "data": {
            "name": "text",
            "source": {"name": "builtin", "max_bytes": 300_000},
            "splits": {"by": "span"},
            "sequence_length": 16,
            "packing": "documents",
        },
    },
    "images": {
        "task": {"name": "segmentation", "balance": 0.5, "recomputed_norms": 2},
        "model": {"name": "segnet-basic", "width": 4, "connection": "add"},
        "data": {
            "name": "images",
            "source": {
                "name": "scenes", "height": 16, "width": 20, "num_train": 10, "num_search": 0,
                "num_validation": 3, "num_test": 0,
            },
            "augment": {"flip": 0.5, "scale": [0.7, 1.4], "colour": 0.2},
        },
    },
}  # fmt: skip


TASKS["every mixer"] = {**TASKS["text"], "model": TASKS["text"]["model"] | mixers.fields_of_each()}
MIXERS = {
    name: {**TASKS["text"], "model": TASKS["text"]["model"] | mixers.fields(name, num_kv_heads=1)}
    for name in mixers.NAMES
}


def config(task="text"):
    """A tiny run with a checkpoint every three steps and several micro-batches."""
    return validate(
        RunConfig,
        {
            **(TASKS | MIXERS)[task],
            "schedule": {"name": "cosine", "warmup_steps": 3},
            "train": {"steps": STEPS, "batch": 4, "micro_batch": 2},
            "evaluation": {"every": 5, "max_units": 2, "sample_tokens": 4},
            "checkpoint": {"every": 3, "keep": 2},
            "runtime": {"device": "cpu", "threads": 1},
        },
    )


def kill_self(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner, name, number, act):
    """Replaces a function so that its call of that number, from 1, does `act` and dies."""
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            act(original, *args, **kwargs)
            kill_self()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def arm(moment, number):
    """Prepares this process's death."""
    import pathlib

    import torch

    from llmeff.core import files
    from llmeff.parallel import sharded_checkpoint
    from llmeff.record import writer
    from llmeff.run import checkpoint

    def nothing(*_args, **_kwargs):
        pass

    def after(original, *args, **kwargs):
        original(*args, **kwargs)

    def half_a_file(original, tensors, path, *args, **kwargs):
        original(tensors, path, *args, **kwargs)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])

    def half_a_line(_original, run_writer, row):
        os.write(run_writer._metrics.fileno(), row.model_dump_json().encode()[:40])

    moments = {
        "backward": (torch.Tensor, "backward", nothing),
        "update": (torch.optim.AdamW, "step", nothing),
        "after update": (torch.optim.AdamW, "step", after),
        "row": (writer.RunWriter, "step", half_a_line),
        "weights": (sharded_checkpoint, "save_file", half_a_file),
        "random state": (checkpoint, "save_file", half_a_file),
        "checksum": (files, "sha256", nothing),
        "before rename": (pathlib.Path, "rename", nothing),
        "after rename": (pathlib.Path, "rename", after),
        "replace": (pathlib.Path, "replace", nothing),
    }
    owner, name, act = moments[moment]
    kill_at_call(owner, name, number, act)


def run(settings, folder, resume, moment, number):
    """A process: trains, and dies where it is told to."""
    from llmeff.run.loop import train

    if moment is not None:
        arm(moment, number)
    train(settings, folder, resume=resume, anew=resume)


def start(settings, folder, *, resume, moment=None, number=0):
    process = CONTEXT.Process(target=run, args=(settings, folder, resume, moment, number))
    process.start()
    return process


def finish(settings, folder):
    """Resumes; or begins anew, where the kill came before there was a checkpoint, or a run."""
    process = start(settings, folder, resume=(folder / "config.json").exists())
    process.join(120)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a task's run that nothing befell."""

    @functools.cache
    def run_of(task):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        finish(config(task), folder)
        return folder

    return run_of


def assert_same_run(one, other):
    """Losses, norms, rates, evaluations and weights, to the last bit."""
    first, second = read_run(one), read_run(other)
    for name in ("step", "loss", "grad_norm", "learning_rate", "items", "items_seen"):
        assert first.steps[name].tolist() == second.steps[name].tolist(), name
    assert len(first.steps["step"]) == STEPS
    # as text, in which what is not known of an image is itself
    assert repr(first.evals.to_pylist()) == repr(second.evals.to_pylist())
    assert repr(first.result.metrics) == repr(second.result.metrics)
    assert first.result.sample == second.result.sample
    for name in ("evaluations.jsonl", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("task", "moment", "number"),
    [
        ("text", "backward", 5),
        ("text", "update", 8),
        ("text", "after update", 4),
        ("text", "row", 8),
        ("text", "weights", 3),
        ("text", "random state", 2),
        ("text", "checksum", 6),
        ("text", "before rename", 2),
        ("text", "after rename", 3),
        ("text", "before rename", 4),
        ("text", "after rename", 4),
        ("text", "replace", 4),  # after the units of the first evaluation, before what they come to
        ("text", "replace", 6),
        ("text", "after rename", 7),  # the last checkpoint is there: the last evaluation is made again
        ("images", "backward", 17),
        ("images", "after update", 8),
        ("images", "replace", 4),
        ("images", "after rename", 7),
        ("every mixer", "after update", 8),
        *(pytest.param(name, "after update", 8, marks=pytest.mark.slow) for name in MIXERS),
    ],
)
def test_killed_and_resumed_is_the_run_that_was_not(unbroken, tmp_path, task, moment, number):
    folder = tmp_path / "run"
    process = start(config(task), folder, resume=False, moment=moment, number=number)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    finish(config(task), folder)
    assert_same_run(unbroken(task), folder)
    assert not list(folder.rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(12))
def test_killed_again_and_again_at_random_moments(unbroken, tmp_path, task, seed):
    folder, chance = tmp_path / "run", random.Random(seed)
    for _ in range(4):
        process = start(config(task), folder, resume=(folder / "config.json").exists())
        process.join(chance.uniform(0.05, 1.2))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.01)
    if not (folder / "result.json").exists():
        finish(config(task), folder)
    assert_same_run(unbroken(task), folder)
