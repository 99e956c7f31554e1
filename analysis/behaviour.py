"""Records the behaviour of llmeff before and after a change of its code, and shows whether it is the same.

    python analysis/behaviour.py record TREE OUT.json         # runs the commands below from the checkout TREE
    python analysis/behaviour.py compare BEFORE.json AFTER.json [--renamed OLD=NEW]

`record` uses only the command line of llmeff and the files that runs write. It works in a temporary folder, on a CPU,
and needs no network. The record of a command consists of data (exit code, numbers, weights, pixels) and texts (printed
output, messages in files, pictures with words). Times, speeds, memory readings, energy and the environment are left
out.

`compare` exits with 1 if data differ. It also shows texts that differ, shortened unless `--texts` is given, but
different texts are not a failure. Make both records on one machine, with the same packages and the same version of this
script.
"""

import argparse
import base64
import csv
import difflib
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LEDGERS = Path(__file__).resolve().parent / "results"
"""Folder of committed ledgers, some of which are compared again, in addition to the runs trained here."""
TIMEOUT_S = 3600
"""Time limit of one command, in seconds, with room for a busy machine."""
FEW = 12
"""Number of differences per command that are shown without `--texts`."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "numpy", "pyarrow", "pydantic", "rich")
"""Packages whose versions may change results and texts; the record names these versions."""


# -- the commands

Stdout = Literal["text", "json", "csv", "table", "timed"]
"""Format of a command's output. table: Markdown whose numbers are data. timed: text whose numbers are ignored."""
TRAIN = ("train", "--config=run.toml")
RANKS = ("parallel.ranks=2", "train.micro_batch=2")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, run in the working folder."""

    name: str
    """Unique name of the command."""
    arguments: tuple[str, ...]
    """Arguments of llmeff, or of `accelerate launch` if `launched`."""
    out: tuple[str, ...] = ()
    """Files and folders that the command writes."""
    stdout: Stdout = "text"
    """Format of its standard output."""
    prepare: Callable[[Path], None] | None = None
    """Function that prepares the working folder before the command runs. None if nothing is needed."""
    needs: tuple[str, ...] = ()
    """Packages that the command needs. It is skipped if one is missing."""
    launched: bool = False
    """Whether `accelerate launch` starts the command."""
    sorts: bool = False
    """Whether to sort the lines of standard error, because their order is random."""


def training(
    name: str, *settings: str, begin: Sequence[str] = TRAIN, more: Sequence[str] = (), is_new: bool = True, **rest: Any
) -> Command:
    """Builds a command that trains the run of `run.toml` with changed settings, in a folder with its own name."""
    named = (f"name={name}",) if is_new else ()
    line = (*begin, *(f"--set={setting}" for setting in (*named, *settings)), f"--out={name}", *more)
    return Command(name=name, arguments=line, out=(name,), **rest)


def cut_off(name: str, source: str, *, has_checkpoint: bool = True) -> Callable[[Path], None]:
    """Returns a function that copies a finished run and makes the copy a stopped run, with or without a checkpoint."""

    def make(folder: Path) -> None:
        own = folder / name
        shutil.copytree(folder / source, own)
        for file in own.glob("*.png"):
            file.unlink()
        (own / "result.json").unlink()
        shutil.rmtree(own / "model")
        places = sorted((own / "checkpoints").iterdir())
        for place in places[1:] if has_checkpoint else places:
            shutil.rmtree(place)

    return make


def runs_of_text() -> list[Command]:
    """Returns runs of language models in one process: mixers, optimizers, number formats, data."""
    every_mixer = (
        "near+mla+linear+performer+retention+gla+deltanet+gated-deltanet+kda+mamba2+softmax",
        "model.num_layers=11", "model.mixers.near=sliding", "model.mixers.near.window=8", "model.mixers.near.sinks=2",
    )  # fmt: skip
    return [
        training("debug", begin=("train", "--recipe=debug")),
        training("plain"),
        training("mixers", f"model.pattern={every_mixer[0]}", *every_mixer[1:]),
        training("mixers-packed", f"model.pattern={every_mixer[0]}", *every_mixer[1:], "data.packing=documents"),
        training(
            "documents", "data.source=jsonl", 'data.source.path=["text.jsonl.zst"]', "data.tokenizer=bpe",
            "data.tokenizer.vocab_size=300", "data.packing=documents", "model.num_kv_heads=1", "model.mixer.qk_norm=true",
            more=("--json",), stdout="json",
        ),
        training("bf16", "precision=bf16", "data.splits.by=span"),
        training("muon", "optim=muon", "schedule=constant", "evaluation.split=test"),
        training(
            "lion", "optim=lion", "optim.lr=1e-3", "schedule=linear", "data.source=parquet",
            'data.source.path=["text.parquet"]', "data.tokenizer=characters", more=("--restarts=1",),
        ),
        training("sgd", "optim=sgd", "optim.lr=0.1", "schedule=wsd", "train.clip_norm=null", more=("--quiet",)),
        training("adamw-8bit", "optim=adamw8bit", "seed=3"),
        training("accumulation", "train.micro_batch=1", "runtime.recompute=true", "model.tied_embeddings=false"),
        training("auto", "train.micro_batch=auto", "evaluation.every=0", "checkpoint.every=0", "task.loss_chunk=8"),
        training("recall", "task=recall", "data=recall", "data.held_out=16"),
        training("diverged", "optim=sgd", "optim.lr=1e30", "schedule=constant", "train.clip_norm=null"),
        training("hf", "model=hf", "model.path=plain/model", "data.tokenizer=hf", "data.tokenizer.path=plain/model"),
        training(
            "lora", "model=hf", "model.path=plain/model", "data.tokenizer=hf", "data.tokenizer.path=plain/model",
            'transforms=[{name = "lora", rank = 2}]', needs=("peft",),
        ),
        training(
            "hf-mixer", "model=hf", "model.path=plain/model", "model.from_scratch=true", "model.mixer=sliding",
            "model.mixer.window=8",
        ),
    ]  # fmt: skip


def runs_of_ranks() -> list[Command]:
    """Returns runs in several processes."""
    zero = ("parallel=deepspeed", *RANKS)
    launch = ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    return [
        training("ddp", "parallel=ddp", *RANKS),
        training("ddp-muon", "parallel=ddp", "parallel.shard_optimizer=true", "optim=muon", *RANKS, more=("--quiet",)),
        training("fsdp", "parallel=fsdp", "parallel.ranks=2", "train.micro_batch=1", "data.packing=documents"),
        training("zero-0", *zero, "parallel.stage=0", needs=("deepspeed",)),
        training("zero-3", *zero, "parallel.stage=3", "precision=bf16", needs=("deepspeed",)),
        training("launched", "parallel=ddp", *RANKS, begin=(*launch, "SCRIPT", *TRAIN[1:]), launched=True),
    ]


def runs_again() -> list[Command]:
    """Returns commands that resume stopped runs, or restart them from scratch."""

    def again(name: str, source: str, *settings: str, flag: str = "--resume", **rest: Any) -> Command:
        stopped = cut_off(name, source, **rest)
        return training(name, *settings, begin=("train", flag), prepare=stopped, is_new=False)

    return [
        again("resumed", "plain"),
        again("resumed-muon", "muon"),
        again("resumed-otherwise", "plain", "evaluation.max_units=2"),
        again("resumed-at-ranks", "plain", "parallel=fsdp", "parallel.ranks=2"),
        again("resumed-alone", "ddp", "parallel=single"),
        again("resumed-lost", "plain", has_checkpoint=False),
        again("anew", "plain", flag="--restart-from-scratch", has_checkpoint=False),
    ]


def runs_of_images() -> list[Command]:
    """Returns segmentation runs, and commands that segment pictures with their models."""
    begin = ("train", "--config=images.toml")
    return [
        training("segnet", begin=begin),
        training(
            "scenes", "data.source=scenes", "data.source.height=24", "data.source.width=32", "data.source.num_train=8",
            "data.source.num_validation=3", "data.source.num_search=0", "data.source.num_test=0", "model.connection=concat",
            "model.residual_blocks=true", "task.balance=0.5", "data.size=null", begin=begin,
        ),
        training("segnet-vgg", "model=segnet", "model.width=4", "model.connection=add", *RANKS, "parallel=ddp",
                 "model.norm=batch_sync", "data.size=[32, 32]", begin=begin),
        training("unet", "model=unet", "data.size=[32, 32]", begin=begin,
                 needs=("torchvision", "segmentation_models_pytorch")),
        Command(name="segment", arguments=("segment", "segnet", "images", "--out=said"), out=("said",)),
        Command(
            name="segment-beside", out=("beside",),
            arguments=("segment", "segnet", "images/test", "--out=beside", "--masks=masks/test", "--beside", "segnet-vgg"),
        ),
    ]  # fmt: skip


def studies() -> list[Command]:
    """Returns sweeps, comparisons, evaluations in longer windows, and a race of mixers."""
    sweep = ("sweep", "--config=study.toml", "--out=study", "--cores=2")
    runs = ("plain", "sgd", "adamw-8bit", "accumulation", "diverged")
    others = ("plain", "muon", "lion", "bf16", "--baseline=plain", "--mixed")
    return [
        Command(name="sweep-plan", arguments=(*sweep, "--plan")),
        Command(name="sweep", arguments=sweep, out=("study",), sorts=True),
        Command(name="sweep-again", arguments=sweep, out=("study/ledger.parquet",), sorts=True),
        Command(name="sweep-slurm", arguments=("sweep", "--config=study.toml", "--out=jobs", "--slurm"), out=("jobs",)),
        Command(name="study-terminal", arguments=("compare", "study", "--metric=bits_per_byte")),
        Command(name="study-markdown", arguments=("compare", "study", "--format=markdown"), stdout="table"),
        Command(name="study-csv", arguments=("compare", "study/ledger.parquet", "--format=csv"), stdout="csv"),
        Command(
            name="study-json", stdout="json", out=("study.html", "study.png"),
            arguments=("compare", "study", "--format=json", "--html=study.html", "--plot=study.png"),
        ),
        *(
            Command(name=f"{name}-ledger", arguments=("compare", f"{name}.parquet", "--format=json"), stdout="json")
            for name in ("contribution", "optimizers", "scenes")
        ),
        Command(name="runs-terminal", arguments=("compare", *runs)),
        Command(name="runs-markdown", arguments=("compare", *runs, "--format=markdown"), stdout="table"),
        Command(name="runs-csv", arguments=("compare", *runs, "--format=csv"), stdout="csv"),
        Command(name="runs-json", arguments=("compare", *runs, "--format=json", "--plot=runs.png"), stdout="json",
                out=("runs.png",)),
        Command(name="runs-mixed", arguments=("compare", *others, "--format=json"), stdout="json"),
        Command(name="context", arguments=("context", "plain", "mixers", "--out=context.json"),
                out=("context.json", "context.png")),
        Command(
            name="bench-mixers", out=("mixers.json",), stdout="timed",
            arguments=("bench", "mixers", "--mixer=softmax", "--mixer=gla", "--length=32", "--length=64", "--length=128",
                       "--processes=2", "--rounds=1", "--out=mixers.json"),
        ),
    ]  # fmt: skip


def prices() -> list[Command]:
    """Returns commands that train nothing: help, configs, plans."""
    large = ("--recipe=default", "--set=model=llama-10m", "--set=train.micro_batch=1")
    zero = (
        "--set=parallel=deepspeed",
        "--set=parallel.ranks=4",
        "--set=parallel.stage=3",
        "--set=runtime.recompute=true",
    )
    return [
        Command(name="help", arguments=("--help",)),
        Command(name="help-train", arguments=("train", "--help")),
        Command(name="config", arguments=("train", "--recipe=default", "--print-config"), stdout="json"),
        Command(name="config-own", arguments=(*TRAIN, "--set=optim=muon", "--print-config"), stdout="json"),
        Command(name="plan", arguments=("plan", *large)),
        Command(name="plan-json", arguments=("plan", *large, "--json"), stdout="json"),
        Command(name="plan-zero", arguments=("plan", *large, *zero, "--json"), stdout="json"),
        Command(name="plan-images", arguments=("plan", "--recipe=segmentation", "--json"), stdout="json"),
        Command(
            name="plan-hf", stdout="json",
            arguments=("plan", "--config=run.toml", "--set=model=hf", "--set=model.path=plain/model", "--json"),
        ),
    ]  # fmt: skip


def errors() -> list[Command]:
    """Returns commands with wrong input, each of which ends with one error."""

    def wrong(name: str, *arguments: str) -> Command:
        return Command(name=f"wrong-{name}", arguments=arguments)

    return [
        wrong("command", "tain"),
        wrong("option", "compare", "plain", "--format=cvs"),
        wrong("recipe", "train", "--recipe=debgu"),
        wrong("value", *TRAIN, "--set=optim=adamv", "--set=train.steps=ten", "--set=model.width=-1"),
        wrong("field", *TRAIN, "--set=train.step=3", "--set=modle.width=4", "--set=model.mixer.windw=3"),
        wrong("pairs", *TRAIN, "--set=train.batch=5", "--set=train.micro_batch=2", "--set=precision=fp16"),
        wrong("schedule", *TRAIN, "--set=schedule.warmup_steps=99"),
        wrong("strategy", *TRAIN, "--set=parallel=fsdp", "--set=parallel.ranks=2", "--set=optim=muon"),
        wrong("data", *TRAIN, '--set=data.source.path=["nowhere.txt"]', "--out=nothing"),
        wrong("folder", *TRAIN, "--out=plain"),
        wrong("ended", "train", "--resume", "--out=plain"),
        wrong("resume", "train", "--resume", "--out=nothing"),
        wrong("compare", "compare", "nothing", "images"),
        wrong("kinds", "compare", "plain", "muon", "bf16", "--baseline=plain"),
        wrong("sweep", "sweep", "--config=run.toml"),
        wrong("segment", "segment", "plain", "images/validation", "--out=nothing"),
    ]


def commands() -> list[Command]:
    """Returns all commands, ordered so that each finds the runs that it reads."""
    return [
        *runs_of_text(), *runs_of_ranks(), *runs_again(), *runs_of_images(), *studies(), *prices(), *errors(),
    ]  # fmt: skip


# -- the data that they run on

RUN = """
name = "small"
model = {name = "decoder", width = 16, num_layers = 2, num_heads = 2, mlp_width = 24}
schedule = {name = "cosine", warmup_steps = 3}
optim = {name = "adamw", lr = 5e-3}
train = {steps = 10, batch = 4, micro_batch = 4}
evaluation = {every = 4, max_units = 3, sample_tokens = 8}
checkpoint = {every = 5}
runtime = {device = "cpu", threads = 1}

[data]
name = "text"
source = {name = "text", path = ["text/*.txt"]}
splits = {search = 0.1, validation = 0.2, test = 0.1}
sequence_length = 32
"""
IMAGES = """
name = "pictures"
task = {name = "segmentation"}
model = {name = "segnet-basic", width = 8, norm = "group"}
schedule = {name = "constant"}
train = {steps = 6, batch = 4, micro_batch = 2}
evaluation = {every = 3, max_units = 2}
checkpoint = {every = 3}
runtime = {device = "cpu", threads = 1}

[data]
name = "images"
size = [24, 32]
augment = {flip = 0.5}
source = {name = "folder", path = "images", masks = "masks", class_names = ["ground", "disc", "box"]}
"""
STUDY = """
name = "study"
baseline = "adamw"
metric = "bits_per_byte"
seeds = [0, 1]
tuning = {trials = 2}

[base]
name = "small"
model = {name = "decoder", width = 8, num_layers = 1, num_heads = 1, mlp_width = 8}
schedule = {name = "constant"}
train = {steps = 4, batch = 4, micro_batch = 4}
evaluation = {every = 2, max_units = 2, sample_tokens = 0}
checkpoint = {every = 0}
runtime = {device = "cpu", threads = 1}

[base.data]
name = "text"
source = {name = "text", path = ["text/*.txt"]}
splits = {search = 0.1, validation = 0.2, test = 0.1}
sequence_length = 16

[arms.adamw]
settings = ["optim=adamw"]
search."optim.lr" = {low = 1e-3, high = 3e-2}

[arms.muon]
settings = ["optim=muon"]
search."optim.lr" = [3e-3, 1e-2]
"""
NUM_DOCUMENTS = 24
SPLITS = {"train": 8, "validation": 3, "test": 2}
"""Number of pictures in each split."""


def documents() -> list[str]:
    """Returns texts of invented words, the same on every machine."""
    draw = random.Random(0)
    words = [
        "".join(draw.choice("aeiou" if n % 2 else "bdfklmnrst") for n in range(draw.randint(2, 7))) for _ in range(150)
    ]
    lines = [" ".join(draw.choices(words, k=draw.randint(4, 11))) + ".\n" for _ in range(50 * NUM_DOCUMENTS)]
    return ["é " + "".join(lines[50 * number : 50 * (number + 1)]) for number in range(NUM_DOCUMENTS)]


def picture(draw: random.Random, height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """Draws a disc and a box on noise. Returns the picture and its mask, in which one corner is unlabelled."""
    colours, labels = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    row, column, radius = draw.randrange(height), draw.randrange(width), draw.randint(4, 9)
    top, left = draw.randrange(height - 6), draw.randrange(width - 8)
    for y in range(height):
        for x in range(width):
            is_disc = (y - row) ** 2 + (x - column) ** 2 <= radius**2
            label = 1 if is_disc else 2 if top <= y < top + 6 and left <= x < left + 8 else 0
            shade = draw.randrange(60)
            colours.putpixel((x, y), ((90, 200, 120)[label] + shade, 80 + shade, (60, 60, 190)[label] + shade))
            labels.putpixel((x, y), 255 if y < 2 and x < 2 else label)
    return colours, labels


def fill(folder: Path) -> None:
    """Writes texts, pictures, configs and ledgers into the working folder."""
    for name, content in (("run", RUN), ("images", IMAGES), ("study", STUDY)):
        (folder / f"{name}.toml").write_text(content, encoding="utf-8")
    (folder / "text").mkdir()
    texts = documents()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    with pa.output_stream(str(folder / "text.jsonl.zst"), compression="zstd") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    draw = random.Random(1)
    for split, count in SPLITS.items():
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            for kind, image in zip(("images", "masks"), picture(draw, 30, 40), strict=True):
                image.save(folder / kind / split / f"{number}.png")
    for name in ("contribution", "optimizers", "scenes"):
        shutil.copy(LEDGERS / f"{name}.parquet", folder)


# -- what is left out of records, and what counts as text

LEFT_OUT = "<left out>"
TEMPORARY = "tmp"
"""Name of the folder for temporary files in the working folder."""
TIMED = {"timings", "mfu", "energy_j", "seconds", "exponent", "overtakes"}
"""Keys of times and of values computed from times, in addition to keys that end in `_s`."""
SETTINGS = {"timeout_s"}
"""Keys that end in `_s` but are settings."""
PLACES = {"environment", "commit", "diff_sha256", "usable_bytes"}
"""Keys that describe the machine and its free memory."""
MESSAGES = {"diagnosis", "caveat", "footnote", "notes", "scored", "failure"}
"""Keys of messages for people. Their values count as text."""


class Cleaner:
    """Removes from data and texts what differs between runs of the same code.

    Args:
        folder: the working folder.
        tree: the checkout.
    """

    def __init__(self, folder: Path, tree: Path):
        self._paths = {
            str(folder): "<work>",
            str(tree): "<tree>",
            sys.executable: "<python>",
            sys.prefix: "<environment>",
        }
        self.messages: list[str] = []
        """Messages that were found in the cleaned data."""

    def data(self, value: Any, key: str = "") -> Any:
        """Cleans a JSON value. Moves messages in it to `messages`."""
        if isinstance(value, list):
            return [self.data(own, key) for own in value]
        if key in MESSAGES and value is not None:
            self.messages.append(f"{key}: {self.text(str(value))}")
            return LEFT_OUT
        if is_left_out(key, value):
            return LEFT_OUT
        if isinstance(value, Mapping):
            return {name: self.data(own, name) for name, own in value.items()}
        return self.paths(value) if isinstance(value, str) else value

    def paths(self, text: str) -> str:
        """Replaces the paths of folders by fixed names."""
        for path, name in sorted(self._paths.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(path, name)
        return re.sub(rf"<work>/{TEMPORARY}/[\w.-]+", "<temporary>", text)

    def text(self, text: str) -> str:
        """Replaces paths, times, dates, speeds and memory readings in a text, and shortens repeated characters."""
        text = "\n".join(unmeasured(self.paths(text).splitlines()))
        for pattern, name in PATTERNS:
            text = pattern.sub(name, text)
        return text


def is_left_out(key: str, value: Any) -> bool:
    """Returns whether to leave out a value because it differs from run to run. A null value is kept."""
    if value is None or key in SETTINGS:
        return False
    is_machine = key == "device" and value not in ("cpu", "auto", "cuda")
    is_race = key == "ratio" and isinstance(value, Mapping)  # a ratio of times, in races of mixers
    return key.endswith("_s") or key in TIMED or key in PLACES or is_machine or is_race


NUMBER = r"\d[\d,]*(?:\.\d+)?"
PATTERNS = [
    (re.compile(pattern, re.MULTILINE), name)
    for pattern, name in (
        (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*(?:\+\d\d:?\d\d)?", "<date>"),
        (r"^[IWE]\d{4} [\d:.]+ +\d+ ", "<date> "),
        (r"\b\d+h \d\dm\b|\b\d+m \d\ds\b|\b" + NUMBER + r" ?(?:ms|s|min|h)\b", "<time>"),
        (r"\bbetween " + NUMBER + r"[kMGT]? and " + NUMBER + r"[kMGT]?", "between <speed>"),
        (NUMBER + r" ?[kMGTPE]?(?: ?[\w-]+)?/s\b", "<speed>"),
        (r"\bMFU " + NUMBER + "%", "MFU <speed>"),
        (r"port[= ]\d+", "port <port>"),
        (r"0x[0-9a-f]{6,}", "<address>"),
        (r"([-=─━═])\1{2,}", r"\1\1\1"),
        (r"[ \t]+", " "),
        (r" $", ""),
    )
]
PROGRESS = re.compile(r"^step (\d+)/(\d+), ")
BARS = re.compile(r"[|│┃]")


def unmeasured(lines: Sequence[str]) -> Iterator[str]:
    """Yields lines without measured times and memory, which occur in progress lines and in tables.

    Keeps only the first and the last progress line, because the clock decides when the others are printed.
    """
    has_begun, timed = False, set[int]()
    for line in lines:
        if told := PROGRESS.match(line):
            is_last = told[1] == told[2]
            if has_begun and not is_last:
                continue
            has_begun = not is_last
            yield re.sub(NUMBER + r" ?(?:[KMGT]i)?B\b", "<memory>", line)
        elif BARS.match(line.strip()):
            cells = BARS.split(line.strip())
            named = {place for place, cell in enumerate(cells) if cell.strip().endswith("/s")}
            timed |= named
            if any(place == 1 for place in named):
                masked = set(range(2, len(cells)))
            else:
                masked = timed - named
            yield "|".join(
                re.sub(NUMBER + "[kMGT]?", "#", cell) if place in masked else cell for place, cell in enumerate(cells)
            )
        else:
            if line and line[0] not in "┏┡├└╇━┗":
                timed.clear()
            yield line


# -- the content of files


def sha256(content: bytes) -> str:
    """Returns the SHA-256 of some bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def tensors(content: bytes) -> dict[str, Any]:
    """Summarizes a safetensors file: all names, and one hash over number formats, shapes and bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    entries, start = json.loads(content[8 : 8 + size]), 8 + size
    entries.pop("__metadata__", None)
    total = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        first, last = entry["data_offsets"]
        total.update(f"{name} {entry['dtype']} {entry['shape']}\0".encode() + content[start + first : start + last])
    return {"names": sorted(entries), "sha256": total.hexdigest()}


def pixels(content: bytes) -> str:
    """Returns the mode, the size and a hash of an image's pixels."""
    with Image.open(io.BytesIO(content)) as image:
        shown = image.convert("RGBA") if image.mode != "P" else image
        return f"{image.mode} {image.size} {sha256(shown.tobytes() + bytes(image.getpalette() or ()))}"


def columns(path: Path) -> dict[str, Any]:
    """Reads a Parquet file: its metadata, column types, and columns. JSON in strings is parsed."""
    table = pq.read_table(path)
    about = {key.decode(): parsed(value.decode()) for key, value in (table.schema.metadata or {}).items()}
    return {
        "about": about,
        "types": [f"{own.name}: {own.type}" for own in table.schema],
        "columns": {name: [parsed(value) for value in table[name].to_pylist()] for name in table.column_names},
    }


def parsed(value: Any) -> Any:
    """Parses a string that holds a JSON object or list. Returns any other value as it is."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def seen(page: str) -> str:
    """Returns the visible content of an HTML page: its words, one line per element, and a hash of each picture."""
    drawn = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    words = re.sub(r"</t[dh]>", " | ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    lines = (html.unescape(line).strip() for line in re.sub(r"<[^>]+>", "\n", words).splitlines())
    return "\n".join([*filter(None, lines), *(pixels(base64.b64decode(own)) for own in drawn)])


LARGE = 100_000
"""JSON files of at least this many bytes are recorded as a hash only. These are the tables of tokenizers."""
WORDLESS = (".mask.png", ".overlay.png")
"""Endings of the names of pictures without words, which count as data."""


def data_in(path: Path, cleaner: Cleaner) -> Any:
    """Returns the data of a file. None if the file counts as text."""
    content = path.read_bytes()
    match path.suffix:
        case ".jsonl":
            return cleaner.data([json.loads(line) for line in content.splitlines()])
        case ".json" if path.name == "env.json":
            return sorted(json.loads(content))
        case ".json" if len(content) < LARGE:
            return cleaner.data(without_state(json.loads(content)))
        case ".parquet":
            return cleaner.data(columns(path))
        case ".safetensors" if path.parent.name != "model":
            return tensors(content)
        case ".png" if path.name.endswith(WORDLESS):
            return pixels(content)
        case ".png" | ".html" | ".log" | ".sh" | ".sbatch":
            return None
    return sha256(content)


def text_in(path: Path, cleaner: Cleaner) -> str:
    """Returns the text of a file, or a hash of the pixels for a picture with words. Empty if the file is data."""
    match path.suffix:
        case ".png" if not path.name.endswith(WORDLESS):
            return pixels(path.read_bytes())
        case ".html":
            return cleaner.text(seen(path.read_text(encoding="utf-8")))
        case ".sh" | ".sbatch":
            return cleaner.text(path.read_text(encoding="utf-8"))
    return ""


def without_state(value: Any) -> Any:
    """Drops the hash of a checkpoint's `state.json`, because that file has times. The file itself is recorded."""
    if isinstance(value, dict) and isinstance(value.get("sha256"), dict):
        return value | {"sha256": {name: own for name, own in value["sha256"].items() if name != "state.json"}}
    return value


def found_in(place: Path, cleaner: Cleaner) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the data and the texts of all files in a folder, by name.

    Skips `engine.log`: the messages of a launcher after the end of a run vary at random.
    """
    data, texts = {}, {}
    paths = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    for path in paths:
        if path.name == "engine.log":
            continue
        name = path.relative_to(place.parent).as_posix()
        data[name] = data_in(path, cleaner)
        if text := text_in(path, cleaner):
            texts[name] = text
    return data, texts


def printed(stdout: str, kind: Stdout, cleaner: Cleaner) -> tuple[Any, str]:
    """Splits the standard output of a command into data and text."""
    if kind == "text" or not stdout.strip():
        return None, cleaner.text(stdout)
    if kind == "timed":
        return None, re.sub(r"not yet|-?" + NUMBER, "#", cleaner.text(stdout))
    if kind == "json":
        found = parsed(stdout)
        return (cleaner.data(found), "") if found is not stdout else ("no JSON", cleaner.text(stdout))
    if kind == "csv":
        return cleaner.data(list(csv.DictReader(io.StringIO(stdout)))), ""
    text = cleaner.text(stdout)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [re.findall(r"-?" + NUMBER + r"(?:e-?\d+)?", row) for row in rows], text


# -- record


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Returns the environment of commands: no variables of launchers or llmeff, and the checkout on Python's path."""
    ours = ("PYTHON", "LLMEFF", "ACCELERATE", "FSDP", "TORCHELASTIC", "MASTER_", "SLURM", "DS_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in ranks}
    return kept | {
        "PYTHONPATH": str(tree), "LLMEFF_CACHE": str(folder / "cache"), "TMPDIR": str(folder / TEMPORARY), "COLUMNS": "240",
        "TERM": "dumb", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def line_of(command: Command, tree: Path) -> list[str]:
    """Returns the command line as a list of words."""
    if not command.launched:
        return [sys.executable, "-P", "-m", "llmeff.cli", *command.arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(tree / "llmeff" / "train.py")
    given = [script if own == "SCRIPT" else own for own in command.arguments]
    return [sys.executable, "-P", "-m", "accelerate.commands.launch", f"--main_process_port={port}", *given]


def result_of(command: Command, tree: Path, folder: Path) -> dict[str, Any]:
    """Runs a command and returns its data and its texts."""
    missing = [name for name in command.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"data": {"skipped": f"needs {', '.join(missing)}"}, "texts": {}}
    if command.prepare is not None:
        command.prepare(folder)
    done = subprocess.run(
        line_of(command, tree), cwd=folder, env=environment(tree, folder), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    cleaner = Cleaner(folder, tree)
    shown, out = printed(done.stdout, command.stdout, cleaner)
    texts = {"stdout": out, "stderr": cleaner.text(done.stderr)}
    if command.sorts:
        texts["stderr"] = "\n".join(sorted(texts["stderr"].splitlines()))
    data = {"exit code": done.returncode, "stdout": shown, "files": {}}
    for name in command.out:
        own_data, own_texts = found_in(folder / name, cleaner)
        data["files"] |= own_data
        texts |= own_texts
    texts["messages in data"] = "\n".join(cleaner.messages)
    return {"data": data, "texts": {name: text for name, text in texts.items() if text}}


def check(tree: Path, folder: Path) -> None:
    """Ends the script if Python would import llmeff from outside the checkout."""
    line = [sys.executable, "-P", "-c", "import llmeff; print(llmeff.__file__)"]
    done = subprocess.run(line, cwd=folder, env=environment(tree, folder), capture_output=True, text=True, check=False)
    if not Path(done.stdout.strip()).is_relative_to(tree):
        sys.exit(f"{tree}: llmeff is imported from another place, {done.stdout.strip() or 'nowhere'}{done.stderr}")


def commit_of(tree: Path) -> str:
    """Returns the commit of a checkout as git describes it. Empty if git does not know it."""
    line = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def record(tree: Path, out: Path, only: Sequence[str]) -> None:
    """Runs the commands from a checkout, all or only those in `only`, and writes the record."""
    began_s, found = time.perf_counter(), {}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    about = {"commit": commit_of(tree), "python": platform.python_version(), "packages": versions}
    about["script"] = sha256(Path(__file__).read_bytes())
    with tempfile.TemporaryDirectory(prefix="behaviour-") as place:
        folder = Path(place).resolve()
        (folder / TEMPORARY).mkdir()
        check(tree, folder)
        fill(folder)
        for command in commands():
            if only and command.name not in only:
                continue
            start_s = time.perf_counter()
            found[command.name] = result_of(command, tree, folder)
            data = found[command.name]["data"]
            said = data.get("skipped", f"exit code {data.get('exit code')}")
            print(f"{command.name:<20}{time.perf_counter() - start_s:>7.1f} s  {said}", flush=True)
            out.write_text(json.dumps({"about": about, "commands": found}, indent=1) + "\n", encoding="utf-8")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    passed_s, cpu_s = time.perf_counter() - began_s, used.ru_utime + used.ru_stime
    print(f"{len(found)} commands in {passed_s:.0f} s, {cpu_s:.0f} s of CPU: {out}")


# -- compare


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the place and the JSON text of every value in nested data. In JSON text, NaN equals NaN."""
    if isinstance(value, dict) and value:
        for key, own in value.items():
            yield from leaves(own, f"{name}: {key}" if name else key)
    elif isinstance(value, list) and value:
        for place, own in enumerate(value):
            yield from leaves(own, f"{name}[{place}]")
    else:
        yield name, json.dumps(value)


def differences(before: Any, after: Any) -> list[str]:
    """Returns a line for each value that differs or exists in only one of the two."""
    one, other = dict(leaves(before)), dict(leaves(after))
    names = [*one, *(name for name in other if name not in one)]
    nothing = "(not there)"
    return [
        f"{name}: {one.get(name, nothing)} -> {other.get(name, nothing)}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def changed_texts(before: Mapping[str, str], after: Mapping[str, str], context: int) -> list[str]:
    """Returns the unified diff of a command's texts."""
    lines: list[str] = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name, "").splitlines(), after.get(name, "").splitlines()
        lines += difflib.unified_diff(old, new, f"before: {name}", f"after: {name}", lineterm="", n=context)
    return lines


def show(title: str, lines: Sequence[str], *, is_whole: bool) -> None:
    """Prints lines below a title: all if `is_whole`, otherwise the first ones. Prints nothing if there are no lines."""
    if not lines:
        return
    print(title)
    for line in lines if is_whole else lines[:FEW]:
        print(f"  {line}")
    if not is_whole and len(lines) > FEW:
        print(f"  ... and {len(lines) - FEW} more")


def compare(before: Path, after: Path, *, is_whole: bool, renamed: Mapping[str, str]) -> int:
    """Shows the differences between two records. Returns the exit code: 1 if data differ.

    Args:
        before: the first record.
        after: the second record.
        is_whole: show all differences instead of the first few.
        renamed: old names of keys in the first record, with their new names.
    """
    text = before.read_text(encoding="utf-8")
    for name, now in renamed.items():
        text = text.replace(f'"{name}"', f'"{now}"').replace(f'"{name}: ', f'"{now}: ')
    old, new = json.loads(text), json.loads(after.read_text(encoding="utf-8"))
    print(f"{old['about'].pop('commit')} before, {new['about'].pop('commit')} after")
    show("The records were made differently:", differences(old["about"], new["about"]), is_whole=True)
    names = [*old["commands"], *(name for name in new["commands"] if name not in old["commands"])]
    num_data = num_texts = 0
    for name in names:
        one, other = (side["commands"].get(name) for side in (old, new))
        if one is None or other is None:
            data, texts = [f"this command is only in the record {'before' if one else 'after'}"], []
        else:
            data = differences(one["data"], other["data"])
            texts = changed_texts(one["texts"], other["texts"], 3 if is_whole else 0)
        show(f"{name}: data differ", data, is_whole=is_whole)
        show(f"{name}: texts differ", texts, is_whole=is_whole)
        num_data, num_texts = num_data + bool(data), num_texts + bool(texts)
    print(f"Of {len(names)} commands, {num_data} differ in data and {num_texts} in texts.")
    return int(num_data > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    recording = modes.add_parser("record", help="run the commands from a checkout and write the record")
    recording.add_argument("tree", type=Path, metavar="TREE", help="the checkout")
    recording.add_argument("out", type=Path, metavar="OUT.json", help="the record")
    recording.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this command; also name the commands whose runs it reads (repeatable)",
    )
    comparing = modes.add_parser("compare", help="show the differences between two records; exit with 1 if data differ")
    comparing.add_argument("before", type=Path, metavar="BEFORE.json", help="the first record")
    comparing.add_argument("after", type=Path, metavar="AFTER.json", help="the second record")
    comparing.add_argument("--texts", action="store_true", help="show all differences, with the lines around them")
    comparing.add_argument(
        "--renamed",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="key of the data that the change renames (repeatable)",
    )
    options = parser.parse_args()
    if options.mode == "compare":
        renamed = dict(pair.split("=") for pair in options.renamed)
        return compare(options.before, options.after, is_whole=options.texts, renamed=renamed)
    record(options.tree.resolve(), options.out, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
