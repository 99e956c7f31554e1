"""Every command that the pages show runs, in a folder that holds the files they name.

The commands differ from the pages only by added `--set`, which shorten them.
"""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.test_pages import PAGES, ROOT, blocks

pytestmark = pytest.mark.slow

SHORT_RUN = (
    "train.steps=4",
    "train.batch=4",
    "schedule.warmup_steps=1",
    "evaluation.max_units=2",
    "checkpoint.every=2",
)
SHORT_TEXT = (*SHORT_RUN, "data.sequence_length=32", "evaluation.sample_tokens=4")
SHORT_BUILTIN = (*SHORT_TEXT, "data.source.max_bytes=400_000")
SHORT_SCENES = (
    *SHORT_RUN,
    "train.micro_batch=4",
    *(f"data.source.num_{split}=4" for split in ("train", "search", "validation", "test")),
)
SHORT_RECALL = (*SHORT_RUN, "data.held_out=8")
SHORT_SWEEP = (
    "seeds=[7]", "tuning.trials=1", "budget=1024", "base.schedule.warmup_steps=1", "base.data.sequence_length=32",
    "base.evaluation.max_units=2", "base.checkpoint.every=0",
)  # fmt: skip
BEFORE = {
    "runs/mine": ["--set=data.source=text", '--set=data.source.path=["corpus/*.txt"]', "--set=model=llama-10m"],
    "runs/ten": ["--set=model=llama-10m"],
    "runs/default": [],
    "runs/x": ["--set=model=llama-1m", "--set=parallel=ddp", "--set=parallel.ranks=2"],
    "runs/segmentation": ["--recipe", "segmentation"],
    "runs/add": ["--recipe", "segmentation"],
    "runs/none": ["--recipe", "segmentation", "--set=model.connection=none"],
    "runs/unet": ["--recipe", "segmentation", "--set=model.connection=concat1x1"],
}
"""Runs that the pages name: the folder, and the arguments of `llmeff train`."""
PRELUDE = """
from typing import ClassVar, Literal

import torch

from llmeff.attention import Linear
from llmeff.optim import OptimizerConfig
from llmeff.optim.optimizer import state_price


class MyOptimizer(OptimizerConfig):
    sharding: ClassVar = "elementwise"
    name: Literal["mine"] = "mine"

    def groups(self, roles):
        return [list(roles)]

    def build(self, rows):
        return torch.optim.SGD([row.parameter for row in rows], lr=self.lr)

    def price(self, weights, precision):
        return state_price(weights, lambda weight: 0)


class MyMixer(Linear):
    name: Literal["mine"] = "mine"


"""
"""Components of a user's own, for the page's checks of them."""


def commands(page):
    """The commands of a page, in order: of its shell blocks, and at the head of its config files. Python counts as one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(sh|toml|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "sh":
            found = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
            yield from (words for words in found if words)
        elif shown := re.match(r"# \S+?(?:: |, used by: )(llmeff .*)", block):
            yield shlex.split(shown[1])
        elif language == "python":
            yield ["python", "-c", PRELUDE + block if "My" in block else block]


def settings_of(words):
    """The settings that shorten a command."""
    line = " ".join(words)
    if words[0] in ("make", "python") or {"--resume", "--print-config", "plan", "mixers"} & {*words}:
        return ()
    if "sweep" in words:
        return SHORT_SWEEP
    if "segmentation" in words and "train" in words:
        return SHORT_SCENES
    if "photos.toml" in words:
        return SHORT_RUN
    if "task=recall" in words:
        return SHORT_RECALL
    if {"train", "bench", "llmeff/train.py"} & {*words} or "bash" in words:
        return SHORT_TEXT if "my.toml" in words or "data.source=text" in line else SHORT_BUILTIN
    return ()


def run(words, folder):
    """Runs a command in a folder with its short settings, and returns the finished process."""
    given = [*words, *(f"--set={setting}" for setting in settings_of(words))]
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    while "=" in given[0]:
        name, _, value = given.pop(0).partition("=")
        variables[name] = value
    return subprocess.run(
        given, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=900, check=False
    )


def write_text(folder):
    """Writes the text, its tokenizer and the pretrained model."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfglmnrst", k=draw.randint(2, 8))) for _ in range(400)]
    documents = [" ".join(draw.choices(words, k=80)) + "." for _ in range(600)]
    (folder / "input.txt").write_text("\n\n".join(documents), encoding="utf-8")
    (folder / "corpus").mkdir()
    for number in range(100):
        part = "\n\n".join(documents[number::100])
        (folder / "corpus" / f"{number}.txt").write_text(part, encoding="utf-8")
    lines = "".join(f'{{"text": "{document}"}}\n' for document in documents)
    import zstandard

    (folder / "corpus" / "all.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder / "models" / "smollm2")
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "models" / "smollm2")


def write_photos(folder):
    """Writes photos with masks of three classes and unlabelled pixels, and masks of the scenes' classes."""
    draw = np.random.default_rng(0)
    for name in ("photos", "masks", "truth"):
        (folder / name).mkdir()
    for number in range(24):
        height, width = draw.integers(60, 90, 2)
        classes = (np.arange(width) * 3 // width)[None].repeat(height, axis=0).astype(np.uint8)
        photo = np.stack([classes * 80 + draw.integers(0, 40, classes.shape, np.uint8)] * 3, axis=-1)
        Image.fromarray(photo).save(folder / "photos" / f"{number}.png")
        Image.fromarray(classes).save(folder / "truth" / f"{number}.png")
        classes[:4] = 255
        Image.fromarray(classes).save(folder / "masks" / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of the pages: text, models, photos, config files, modules, runs, and the repository's own folders."""
    folder = tmp_path_factory.mktemp("pages")
    write_text(folder)
    write_photos(folder)
    for language in ("toml", "python"):
        for _, block in blocks(language):
            if name := re.match(r"# (\S+\.(?:toml|py))\b", block):
                (folder / name[1]).write_text(block, encoding="utf-8")
    for name in ("ds_configs", "jobs", "llmeff", "analysis"):
        (folder / name).symlink_to(ROOT / name)
    for out, arguments in BEFORE.items():
        done = run(["llmeff", "train", *arguments, "--out", out], folder)
        assert done.returncode == 0, done.stderr
    return folder


def interrupt(run_folder):
    """Leaves a run as if it had been killed after its first checkpoint."""
    for path in (run_folder / "result.json", run_folder / "evals.parquet"):
        path.unlink(missing_ok=True)
    shutil.rmtree(run_folder / "model", ignore_errors=True)
    newest = max((run_folder / "checkpoints").iterdir(), key=lambda path: path.name)
    shutil.rmtree(newest)


SHOWN = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page}: {' '.join(words)[:90]}" for page, words in SHOWN])
def test_a_command_runs(page, words, folder):
    if words[0] == "make":
        if words[1] == "test":
            pytest.skip("make test runs by itself")
        words = ["llmeff", "train", "--recipe", "default"]
    if "--multi_gpu" in words and torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs here")
    if "sbatch" in words:  # what Slurm runs on the node
        job = [word for word in words if word != "sbatch" and not word.startswith("--gpus")]
        script = next(number for number, word in enumerate(job) if word.endswith(".sbatch"))
        words = [f"SLURM_JOB_ID={len(words)}", *job[:script], "bash", *job[script:]]
    if "train" in words and "--out" in words:
        out = folder / words[words.index("--out") + 1]
        interrupt(out) if "--resume" in words else shutil.rmtree(out)
    if "-o" in words:
        shutil.rmtree(folder / words[words.index("-o") + 1], ignore_errors=True)
    done = run(words, folder)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
