"""What llmeff does, before and after a change of its code that is to leave all of it as it is.

    python analysis/behaviour.py record TREE OUT.json         # runs the commands below out of a checkout
    python analysis/behaviour.py compare BEFORE.json AFTER.json [--renamed OLD=NEW]

`record` uses nothing of llmeff but its command line, and the files that runs write. It works in a folder of its own, on a
CPU, and needs no network. What a command comes to is data (exit code, numbers, weights, pixels) or text (what it prints,
messages in files, pictures with words in them). Times, speeds, resident memory, energy and the environment are left out.

`compare` fails where data differ. Texts that differ are shown, briefly or with `--texts` whole, and are no failure.
Both records are to be made on one machine, with the same packages and the same edition of this script.
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
"""Studies that are compared again, beside what is trained here."""
TIMEOUT_S = 3600
"""Of one command, on a machine that has much else to do."""
FEW = 12
"""Differences of a command that are shown unless all are asked for."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "numpy", "pyarrow", "pydantic", "rich")
"""On whose versions results and texts depend."""


# -- what is run

Stdout = Literal["text", "json", "csv", "table", "timed"]
"""What a command prints: text, or data. table: Markdown, of which the numbers are data. timed: text full of times."""
TRAIN = ("train", "--config=run.toml")
RANKS = ("parallel.ranks=2", "train.micro_batch=2")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, in the working folder."""

    name: str
    """Tells it apart."""
    arguments: tuple[str, ...]
    """Of llmeff, or of accelerate where that starts it."""
    out: tuple[str, ...] = ()
    """Files and folders that it writes."""
    stdout: Stdout = "text"
    """What it prints."""
    prepare: Callable[[Path], None] | None = None
    """Makes what it needs, in the working folder."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    launched: bool = False
    """Whether accelerate starts it."""
    sorts: bool = False
    """Whether what it says meanwhile, on standard error, has no order of its own."""


def training(
    name: str, *settings: str, begin: Sequence[str] = TRAIN, more: Sequence[str] = (), is_new: bool = True, **rest: Any
) -> Command:
    """A run in the folder of its name, that of `run.toml` but for some settings."""
    named = (f"name={name}",) if is_new else ()
    line = (*begin, *(f"--set={setting}" for setting in (*named, *settings)), f"--out={name}", *more)
    return Command(name=name, arguments=line, out=(name,), **rest)


def cut_off(name: str, source: str, *, has_checkpoint: bool = True) -> Callable[[Path], None]:
    """Makes a run of another one's folder that looks as if it was stopped, with a checkpoint or without."""

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
    """Language models in one process: mixers, optimizers, formats, data."""
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
    """Several processes."""
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
    """What goes on, or begins anew, where a run was stopped."""

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
    """Segmentation, and what its models make of pictures."""
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
    """Sweeps, comparisons, prices, longer windows."""
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
    """What is said before anything is trained."""
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
    """What is wrong, and said in one error."""

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
    """All, in an order in which each finds what it needs."""
    return [
        *runs_of_text(), *runs_of_ranks(), *runs_again(), *runs_of_images(), *studies(), *prices(), *errors(),
    ]  # fmt: skip


# -- what they are run on

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
"""Pictures of each."""


def documents() -> list[str]:
    """Texts of words that nobody knows, the same on every machine."""
    draw = random.Random(0)
    words = [
        "".join(draw.choice("aeiou" if n % 2 else "bdfklmnrst") for n in range(draw.randint(2, 7))) for _ in range(150)
    ]
    lines = [" ".join(draw.choices(words, k=draw.randint(4, 11))) + ".\n" for _ in range(50 * NUM_DOCUMENTS)]
    return ["é " + "".join(lines[50 * number : 50 * (number + 1)]) for number in range(NUM_DOCUMENTS)]


def picture(draw: random.Random, height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """A disc and a box on noise, and which pixel is what; a corner is nobody's."""
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
    """Text, pictures, configs and studies."""
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


# -- what is left out, and what is text

LEFT_OUT = "<left out>"
TEMPORARY = "tmp"
"""The folder of temporary files in the working folder."""
TIMED = {"timings", "mfu", "energy_j", "seconds", "exponent", "overtakes"}
"""Keys of times, and of what follows from them, beside those that end in `_s`."""
SETTINGS = {"timeout_s"}
"""Keys that end in `_s` and are settings."""
PLACES = {"environment", "commit", "diff_sha256", "usable_bytes"}
"""Keys of where it ran, and of the memory that was free there."""
MESSAGES = {"diagnosis", "caveat", "footnote", "notes", "scored", "failure"}
"""Keys of what is said to people."""


class Cleaner:
    """Takes out of data and texts what is another each time.

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
        """What was said to people in data that were cleaned."""

    def data(self, value: Any, key: str = "") -> Any:
        """A value of JSON; messages are taken out of it."""
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
        """A text in which folders have names that stay."""
        for path, name in sorted(self._paths.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(path, name)
        return re.sub(rf"<work>/{TEMPORARY}/[\w.-]+", "<temporary>", text)

    def text(self, text: str) -> str:
        """A text without paths, times, dates, speeds, memory readings, and with one space or line for many."""
        text = "\n".join(unmeasured(self.paths(text).splitlines()))
        for pattern, name in PATTERNS:
            text = pattern.sub(name, text)
        return text


def is_left_out(key: str, value: Any) -> bool:
    """Whether a value is another each time; what is not there stays."""
    if value is None or key in SETTINGS:
        return False
    is_machine = key == "device" and value not in ("cpu", "auto", "cuda")
    is_race = key == "ratio" and isinstance(value, Mapping)  # of times, in what mixers are timed by
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
    """Lines without what was measured of time and memory: in lines of progress, and in tables.

    Of the lines of progress the first and the last stay: those between come by the clock.
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


# -- what lies in files


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def tensors(content: bytes) -> dict[str, Any]:
    """What a file of safetensors holds: all names, and a sum over formats, shapes and bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    entries, start = json.loads(content[8 : 8 + size]), 8 + size
    entries.pop("__metadata__", None)
    total = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        first, last = entry["data_offsets"]
        total.update(f"{name} {entry['dtype']} {entry['shape']}\0".encode() + content[start + first : start + last])
    return {"names": sorted(entries), "sha256": total.hexdigest()}


def pixels(content: bytes) -> str:
    """A sum over what is seen."""
    with Image.open(io.BytesIO(content)) as image:
        shown = image.convert("RGBA") if image.mode != "P" else image
        return f"{image.mode} {image.size} {sha256(shown.tobytes() + bytes(image.getpalette() or ()))}"


def columns(path: Path) -> dict[str, Any]:
    """A table by its columns, in which JSON is read too, and what it says of itself."""
    table = pq.read_table(path)
    about = {key.decode(): parsed(value.decode()) for key, value in (table.schema.metadata or {}).items()}
    return {
        "about": about,
        "types": [f"{own.name}: {own.type}" for own in table.schema],
        "columns": {name: [parsed(value) for value in table[name].to_pylist()] for name in table.column_names},
    }


def parsed(value: Any) -> Any:
    """What a text of JSON holds, or else the value."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def seen(page: str) -> str:
    """What a page of HTML shows: its words, a line for each element, and its pictures by their pixels."""
    drawn = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    words = re.sub(r"</t[dh]>", " | ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    lines = (html.unescape(line).strip() for line in re.sub(r"<[^>]+>", "\n", words).splitlines())
    return "\n".join([*filter(None, lines), *(pixels(base64.b64decode(own)) for own in drawn)])


LARGE = 100_000
"""Bytes of JSON from which on only a sum over it is kept: tokenizers' tables."""
WORDLESS = (".mask.png", ".overlay.png")
"""Ends of the names of pictures that are data."""


def data_in(path: Path, cleaner: Cleaner) -> Any:
    """What of a file is data; None where it is text."""
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
    """What of a file is text; of a picture with words in it, a sum over its pixels."""
    match path.suffix:
        case ".png" if not path.name.endswith(WORDLESS):
            return pixels(path.read_bytes())
        case ".html":
            return cleaner.text(seen(path.read_text(encoding="utf-8")))
        case ".sh" | ".sbatch":
            return cleaner.text(path.read_text(encoding="utf-8"))
    return ""


def without_state(value: Any) -> Any:
    """JSON without the sum over a checkpoint's state, in which there are times; the state itself is read."""
    if isinstance(value, dict) and isinstance(value.get("sha256"), dict):
        return value | {"sha256": {name: own for name, own in value["sha256"].items() if name != "state.json"}}
    return value


def found_in(place: Path, cleaner: Cleaner) -> tuple[dict[str, Any], dict[str, str]]:
    """The data and the texts of all files below, by name. What a launcher says once a run is over comes by chance."""
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
    """The data and the text of what a command printed."""
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


# -- to record


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Of every command: no launcher's word, no settings of ours, and the checkout first on Python's path."""
    ours = ("PYTHON", "LLMEFF", "ACCELERATE", "FSDP", "TORCHELASTIC", "MASTER_", "SLURM", "DS_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in ranks}
    return kept | {
        "PYTHONPATH": str(tree), "LLMEFF_CACHE": str(folder / "cache"), "TMPDIR": str(folder / TEMPORARY), "COLUMNS": "240",
        "TERM": "dumb", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def line_of(command: Command, tree: Path) -> list[str]:
    """What is started."""
    if not command.launched:
        return [sys.executable, "-P", "-m", "llmeff.cli", *command.arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(tree / "llmeff" / "train.py")
    given = [script if own == "SCRIPT" else own for own in command.arguments]
    return [sys.executable, "-P", "-m", "accelerate.commands.launch", f"--main_process_port={port}", *given]


def result_of(command: Command, tree: Path, folder: Path) -> dict[str, Any]:
    """What a command does."""
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
    """Ends the script where Python would import llmeff from somewhere else."""
    line = [sys.executable, "-P", "-c", "import llmeff; print(llmeff.__file__)"]
    done = subprocess.run(line, cwd=folder, env=environment(tree, folder), capture_output=True, text=True, check=False)
    if not Path(done.stdout.strip()).is_relative_to(tree):
        sys.exit(f"{tree}: llmeff is imported from {done.stdout.strip() or 'nowhere'}{done.stderr}")


def commit_of(tree: Path) -> str:
    """What is checked out, as far as git knows."""
    line = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def record(tree: Path, out: Path, only: Sequence[str]) -> None:
    """Runs all commands out of a checkout, or those that are named, and writes what they did."""
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


# -- to compare


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value in nested data with its place, as JSON, in which NaN is like NaN."""
    if isinstance(value, dict) and value:
        for key, own in value.items():
            yield from leaves(own, f"{name}: {key}" if name else key)
    elif isinstance(value, list) and value:
        for place, own in enumerate(value):
            yield from leaves(own, f"{name}[{place}]")
    else:
        yield name, json.dumps(value)


def differences(before: Any, after: Any) -> list[str]:
    """A line for each value that is not in both, or not the same."""
    one, other = dict(leaves(before)), dict(leaves(after))
    names = [*one, *(name for name in other if name not in one)]
    nothing = "(not there)"
    return [
        f"{name}: {one.get(name, nothing)} -> {other.get(name, nothing)}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def changed_texts(before: Mapping[str, str], after: Mapping[str, str], context: int) -> list[str]:
    """Unified differences of a command's texts."""
    lines: list[str] = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name, "").splitlines(), after.get(name, "").splitlines()
        lines += difflib.unified_diff(old, new, f"before: {name}", f"after: {name}", lineterm="", n=context)
    return lines


def show(title: str, lines: Sequence[str], *, is_whole: bool) -> None:
    """Prints lines below a title, or the first of them."""
    if not lines:
        return
    print(title)
    for line in lines if is_whole else lines[:FEW]:
        print(f"  {line}")
    if not is_whole and len(lines) > FEW:
        print(f"  ... and {len(lines) - FEW} more")


def compare(before: Path, after: Path, *, is_whole: bool, renamed: Mapping[str, str]) -> int:
    """Shows what differs between two records, keys of data renamed; 1 if data do."""
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
            data, texts = [f"was run {'before' if one else 'after'} only"], []
        else:
            data = differences(one["data"], other["data"])
            texts = changed_texts(one["texts"], other["texts"], 3 if is_whole else 0)
        show(f"{name}: data differ", data, is_whole=is_whole)
        show(f"{name}: texts differ", texts, is_whole=is_whole)
        num_data, num_texts = num_data + bool(data), num_texts + bool(texts)
    print(f"Of {len(names)} commands {num_data} differ in data, {num_texts} in text.")
    return int(num_data > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    recording = modes.add_parser("record", help="run the commands out of a checkout, and write what they did")
    recording.add_argument("tree", type=Path, metavar="TREE", help="the checkout")
    recording.add_argument("out", type=Path, metavar="OUT.json", help="the record")
    recording.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run this command; those whose runs it reads must be named too (repeatable)",
    )
    comparing = modes.add_parser("compare", help="show what differs between two records; fail where data do")
    comparing.add_argument("before", type=Path, metavar="BEFORE.json", help="one record")
    comparing.add_argument("after", type=Path, metavar="AFTER.json", help="the other")
    comparing.add_argument("--texts", action="store_true", help="show all that differs, with the lines around it")
    comparing.add_argument(
        "--renamed", action="append", default=[], metavar="OLD=NEW", help="a key that the change renames (repeatable)"
    )
    options = parser.parse_args()
    if options.mode == "compare":
        renamed = dict(pair.split("=") for pair in options.renamed)
        return compare(options.before, options.after, is_whole=options.texts, renamed=renamed)
    record(options.tree.resolve(), options.out, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
