"""Evaluates trained language models on longer windows than in training, and on tokens that end a repeated n-gram."""

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from llmeff.compare.intervals import mean_interval
from llmeff.compare.plots import Curves, curves
from llmeff.compare.text_table import TextTable
from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, validate
from llmeff.core.heartbeat import beat
from llmeff.core.layout import Layout
from llmeff.core.registry import nearest
from llmeff.core.tensors import copy_tensors
from llmeff.core.units import show_bytes
from llmeff.data import TextCorpus, TextData
from llmeff.data.packing import EvalBatch, Ids
from llmeff.data.splits import SPLITS, Split
from llmeff.models import Decoder, llama_format
from llmeff.record.environment import environment
from llmeff.record.reader import model_folder, read_run

# B is the number of windows, T the number of tokens in a window.

FINE = 4
"""Number of spans into which the positions of each training length are divided."""
_COUNTED = 2**24
"""Maximum number of tokens of the training text that are counted for token frequencies."""
_LOGITS = 2**22
"""Approximate number of elements in the logits of a batch."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean loss over tokens."""

    loss: float
    """Nats per token. NaN if there are no tokens."""
    count: int
    """Number of tokens."""


@dataclass(frozen=True, kw_only=True)
class AtLength:
    """Measurements of a model on windows of one length."""

    length: int
    """Number of tokens in a window."""
    all: Mean
    """Loss over all tokens."""
    repeated: Mean
    """Loss over tokens that end a repeated n-gram: one that occurred earlier in the same document of the window."""
    other: Mean
    """Loss over the other tokens."""
    tokens_per_s: float
    """Throughput of the forward pass, in tokens per second. Median over batches."""
    state_bytes: int
    """Bytes of the decoding cache after a sequence of `length` tokens, in the number format of the parameters."""


@dataclass(frozen=True, kw_only=True)
class LongRange:
    """Measurements of one model."""

    run: str
    """The run's folder, relative to the folder that contains all runs."""
    arm: str
    """Name of the arm. Runs that differ only in the seed have the same arm, which is named after these runs. If two arms
    would get the same name, each is named after the folder of its first run instead."""
    training_length: int
    """Number of tokens in a training window."""
    unigram_loss: float
    """Loss on the held-out text, in nats per token, if tokens are predicted only by their frequency in the training text."""
    lengths: list[AtLength]
    """Measurements on windows of 1, 2, 4, ... times the training length."""
    positions: list[tuple[int, Mean]]
    """Loss by position, in windows of the largest length. Each entry is the first position of a span, and the mean loss in
    the span. There are `FINE` spans per training length."""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A run that has ended, with its model and its text corpus."""

    config: RunConfig
    model: Decoder
    corpus: TextCorpus
    training_length: int


def long_range(
    folders: Sequence[Path], *, times: int = 4, gram: int = 2, split: Split = "validation", max_tokens: int = 2**17
) -> list[LongRange]:
    """Evaluates models on held-out text in windows of 1, 2, 4, ... times their training length.

    Args:
        folders: folders of runs that have ended.
        times: largest multiple of the training length. It must be a power of 2.
        gram: n of the repeated n-grams; 2 means bigrams. Arora et al. 2023 (arXiv 2312.04927) leave out bigrams that are
            frequent in training. Here all n-grams count.
        split: the split whose text is used.
        max_tokens: number of tokens to use, from the beginning of the split. It must cover at least one window of the
            largest length.

    Raises:
        ConfigError: a folder does not contain a run of a decoder on text, the runs have different texts or tokenizers, or
            an argument is out of range.
    """
    problems = _argument_problems(folders, times, gram, split, max_tokens)
    if problems:
        raise ConfigError(problems)
    # evaluation may take long, so all runs are opened first to find errors early
    opened, runs = [_open(each, times, split, max_tokens) for each in folders], _apart(folders)
    texts = {each.corpus.fingerprint: run for each, run in zip(opened, runs, strict=True)}
    if len(texts) > 1:
        raise ConfigError(
            f"{' and '.join(texts.values())} use different texts or tokenizers, so their losses are not comparable. Give only "
            "runs that use the same text and tokenizer"
        )
    arms = _arms(runs, [each.config for each in opened])
    return [
        _read(each, run, arm, times, gram, split, max_tokens) for each, run, arm in zip(opened, runs, arms, strict=True)
    ]


def _argument_problems(folders: Sequence[Path], times: int, gram: int, split: str, max_tokens: int) -> list[str]:
    problems = []
    if split not in SPLITS:
        problems.append(f"--split {split!r}: there is no such split.{nearest(split, SPLITS)}")
    if times < 1 or times & (times - 1):
        problems.append(f"--times {times}: must be a power of 2")
    if gram < 2:
        problems.append(f"--gram {gram}: must be at least 2")
    if max_tokens < 1:
        problems.append(f"--max-tokens {max_tokens}: must be at least 1")
    counts = Counter(folder.resolve() for folder in folders)
    return problems + [f"{folder}: this run is given twice" for folder, count in counts.items() if count > 1]


def _apart(folders: Sequence[Path]) -> list[str]:
    """Returns the folders relative to the folder that contains all of them."""
    whole = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath([each.parent for each in whole])) if whole else Path()
    return [each.relative_to(shared).as_posix() for each in whole]


def _arms(runs: Sequence[str], configs: Sequence[RunConfig]) -> list[str]:
    """Returns the name of each run's arm. Runs whose configs differ only in the seed have the same arm."""
    without_seed = [config.model_copy(update={"seed": 0}).model_dump_json() for config in configs]
    firsts = [without_seed.index(text) for text in without_seed]
    names = Counter(configs[first].name for first in set(firsts))
    return [configs[first].name if names[configs[first].name] == 1 else runs[first] for first in firsts]


def _read(opened: _Opened, run: str, arm: str, times: int, gram: int, split: Split, max_tokens: int) -> LongRange:
    model, corpus, length = opened.model, opened.corpus, opened.training_length
    multiples = [2**power for power in range(times.bit_length())]
    found = [_at_length(model, corpus, length * multiple, gram, split, max_tokens) for multiple in multiples]
    seen, losses = found[-1][1]
    borders = [place * length // FINE for place in range(times * FINE + 1)]
    positions = [(start, _mean(losses[(seen >= start) & (seen < end)])) for start, end in pairwise(borders)]
    return LongRange(
        run=run,
        arm=arm,
        training_length=length,
        unigram_loss=_unigram_loss(corpus, split, max_tokens),
        lengths=[at_length for at_length, _ in found],
        positions=positions,
    )


def _unigram_loss(corpus: TextCorpus, split: Split, max_tokens: int) -> float:
    """Returns the loss in nats per token if tokens are predicted by their frequency in the training text.

    1 is added to each count, so that no token has probability 0.
    """
    counts = np.bincount(corpus.stream("train").tokens[:_COUNTED], minlength=corpus.vocab_size) + 1
    return float(-np.log(counts / counts.sum())[corpus.stream(split).tokens[1 : max_tokens + 1]].mean())


def _open(folder: Path, times: int, split: Split, max_tokens: int) -> _Opened:
    run = read_run(folder)
    config = validate(RunConfig, run.config)
    if not isinstance(config.data, TextData):
        raise ConfigError(f"{folder}: this run used data {config.data.name!r}, but this command needs a run on text")
    model_config, tensors = llama_format.load(model_folder(run))
    model, corpus, length = model_config.build(), config.data.open(), config.data.sequence_length
    copy_tensors(model, tensors)
    available = len(corpus.stream(split).tokens) - 1
    if available < length * times:
        raise ConfigError(
            f"{folder}: the split {split!r} has {available} tokens, but a window of {times} times the training length needs "
            f"{length * times}. Choose another split ({', '.join(SPLITS)}) or a smaller --times"
        )
    if max_tokens < length * times:
        raise ConfigError(
            f"--max-tokens {max_tokens}: {folder} was trained on windows of {length} tokens, so a window of {times} times that "
            f"length needs {length * times} tokens. Give at least that many, or a smaller --times"
        )
    return _Opened(config=config, model=model.eval(), corpus=corpus, training_length=length)


@torch.inference_mode()
def _at_length(
    model: Decoder, corpus: TextCorpus, length: int, gram: int, split: Split, max_tokens: int
) -> tuple[AtLength, tuple[Ids, NDArray[np.float64]]]:
    """Returns (measurements, (positions, losses)) on windows of one length.

    Positions and losses have one entry per target: the number of tokens before it, and its loss in nats.
    """
    windows = corpus.eval_windows(split, length, min(max_tokens, len(corpus.stream(split).tokens) - 1))
    rows = max(1, _LOGITS // max(corpus.vocab_size, 1024) // length)
    seen, losses, hits, rates = [], [], [], []
    for start in range(0, windows.num_windows, rows):
        beat()
        packed = windows.batch(range(start, min(start + rows, windows.num_windows)))
        tokens = torch.from_numpy(packed.tokens)
        began = time.perf_counter()
        logits = model(tokens, _layout(packed)).float()
        rates.append(tokens.numel() / (time.perf_counter() - began))
        each = F.cross_entropy(logits.mT, torch.from_numpy(packed.targets), reduction="none").double().numpy()
        counted = packed.target_documents >= 0
        places = (
            np.broadcast_to(np.arange(length), packed.tokens.shape) if packed.positions is None else packed.positions
        )
        seen.append(places[counted])
        losses.append(each[counted])
        hits.append(repeated(packed, gram)[counted])
    all_seen, loss, hit = np.concatenate(seen), np.concatenate(losses), np.concatenate(hits)
    measures = AtLength(
        length=length,
        all=_mean(loss),
        repeated=_mean(loss[hit]),
        other=_mean(loss[~hit]),
        tokens_per_s=statistics.median(rates),
        state_bytes=model.config.cache_bytes(length, next(model.parameters()).itemsize),
    )
    return measures, (all_seen, loss)


def _layout(packed: EvalBatch) -> Layout | None:
    if packed.positions is None or packed.documents is None:
        return None
    return Layout(positions=torch.from_numpy(packed.positions), documents=torch.from_numpy(packed.documents))


def repeated(packed: EvalBatch, gram: int) -> NDArray[np.bool_]:
    """Returns (B, T): for each target, whether its n-gram occurred earlier in the same document and the same row.

    Args:
        packed: a batch of windows.
        gram: n. The n-gram of a target ends with the target.
    """
    whole = np.concatenate((packed.tokens, packed.targets[:, -1:]), axis=1)
    apart = np.zeros_like(packed.tokens) if packed.documents is None else packed.documents
    num_rows, length = packed.tokens.shape
    found = np.zeros((num_rows, length), dtype=bool)
    if length + 1 < gram:
        return found
    grams = np.lib.stride_tricks.sliding_window_view(whole, gram, axis=1)
    for row in range(num_rows):
        begins, ends = apart[row, : length + 2 - gram], apart[row, gram - 2 :]
        places = np.arange(len(ends))
        # an n-gram that spans two documents gets a unique number, so that it never counts as repeated
        documents = np.where(begins == ends, ends, -2 - places)
        keys = np.column_stack((documents, grams[row]))
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        found[row, gram - 2 :] = first[inverse.reshape(-1)] < places
    return found


def _mean(losses: NDArray[np.float64]) -> Mean:
    return Mean(loss=float(losses.mean()) if len(losses) else float("nan"), count=len(losses))


def as_json(found: Sequence[LongRange]) -> dict[str, Any]:
    """Returns the measurements and the environment as JSON values. NaN becomes None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and value != value else value

    where = environment(torch.device("cpu")).model_dump(mode="json")
    return {"environment": where, "runs": [plain(asdict(each)) for each in found]}


def tables(found: Sequence[LongRange]) -> list[TextTable]:
    """Returns a table with a row for each arm and length. Losses are means over runs, with 95 % intervals if an arm has several."""
    rows = [_row(arm, runs, place) for arm, runs in _by_arm(found).items() for place, _ in enumerate(runs[0].lengths)]
    unigram_losses = dict.fromkeys(f"{each.unigram_loss:.4f}" for each in found)
    rows += [["token frequencies", "-", loss, *["-"] * 5] for loss in unigram_losses]
    headers = [
        "arm, window",
        "runs",
        "loss",
        "of repeated n-grams",
        "of other tokens",
        "repeated",
        "tokens/s",
        "state",
    ]
    return [TextTable(title="Loss (nats per token) by window length", headers=headers, rows=rows)]


def _row(arm: str, runs: Sequence[LongRange], place: int) -> list[str]:
    """Returns an arm's row of the table, for the length at index `place`."""
    at_length = [run.lengths[place] for run in runs]
    first = at_length[0]
    return [
        f"{arm}, {first.length} ({first.length // runs[0].training_length} x)",
        str(len(runs)),
        _shown([each.all.loss for each in at_length]),
        _shown([each.repeated.loss for each in at_length]),
        _shown([each.other.loss for each in at_length]),
        f"{100 * first.repeated.count / first.all.count:.1f} %",
        f"{statistics.median(each.tokens_per_s for each in at_length):,.0f}",
        show_bytes(first.state_bytes),
    ]


def _by_arm(found: Sequence[LongRange]) -> dict[str, list[LongRange]]:
    arms: dict[str, list[LongRange]] = {}
    for each in found:
        arms.setdefault(each.arm, []).append(each)
    return arms


def _shown(losses: Sequence[float]) -> str:
    mean = mean_interval(losses)
    if math.isnan(mean.value):
        return "-"
    return f"{mean.value:.4f}" + ("" if mean.n == 1 else f" ({mean.lower:.4f} to {mean.upper:.4f})")


def picture(found: Sequence[LongRange]) -> bytes:
    """Plots the mean loss of each arm over the number of preceding tokens. Returns a PNG.

    If the training length differs between runs, the horizontal axis is in units of the training length.
    """
    lengths = {each.training_length for each in found}
    unit, words = (lengths.pop(), "tokens seen") if len(lengths) == 1 else (1, "training lengths seen")
    places = [unit * (place + 0.5) / FINE for place in range(len(found[0].positions))]
    values = {
        arm: [statistics.fmean(run.positions[place][1].loss for run in runs) for place, _ in enumerate(places)]
        for arm, runs in _by_arm(found).items()
    }
    panel = Curves(label="loss (nats per token)", values=values)
    return curves(places, [panel], words, "Longer windows than in training", until=float(unit))
