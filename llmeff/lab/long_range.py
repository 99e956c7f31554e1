"""The loss of trained language models at longer contexts than in training, and on tokens that repeat earlier ones."""

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

# B windows, T tokens of a window

FINE = 4
"""Spans of positions for each training length."""
_COUNTED = 2**24
"""Token frequencies are of so many tokens of the training text, at most."""
_LOGITS = 2**22
"""Elements of the logits of a batch, about."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean loss."""

    loss: float
    """Nats per token; NaN if there is no token."""
    count: int
    """Tokens that it is over."""


@dataclass(frozen=True, kw_only=True)
class AtLength:
    """The measures of a model in windows of one length."""

    length: int
    """Tokens of a window."""
    all: Mean
    """Over all tokens."""
    repeated: Mean
    """Over tokens that end a repeated n-gram, which the model can recall: it was in the same document of the window before."""
    other: Mean
    """Over the other tokens."""
    tokens_per_s: float
    """Of the forward pass, median over batches."""
    state_bytes: int
    """Bytes of the cache after a sequence of `length` tokens, in the format of the parameters."""


@dataclass(frozen=True, kw_only=True)
class LongRange:
    """The measures of one model."""

    run: str
    """Its folder, below the folder of all runs."""
    arm: str
    """The same for runs that differ only in their seeds: their name or, if other runs have that name too, the folder of the
    first of them."""
    training_length: int
    """Tokens of a window in training."""
    unigram_loss: float
    """Nats per token on the same text if each token is predicted by its frequency in the training text alone."""
    lengths: list[AtLength]
    """At the training length, twice that, four times that, and so on."""
    positions: list[tuple[int, Mean]]
    """In windows of the largest length, by spans of positions: the first position of a span, and the mean loss in it. There
    are `FINE` spans for each training length."""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A run that has ended, with its model and its text."""

    config: RunConfig
    model: Decoder
    corpus: TextCorpus
    training_length: int


def long_range(
    folders: Sequence[Path], *, times: int = 4, gram: int = 2, split: Split = "validation", max_tokens: int = 2**17
) -> list[LongRange]:
    """Evaluates models on held-out text in windows of 1, 2, 4, ... times their training length.

    Args:
        folders: runs that have ended.
        times: the largest multiple, a power of 2.
        gram: n of the n-grams that count as repeated; 2: bigrams. Arora et al. 2023 (arXiv 2312.04927) leave out bigrams
            that are frequent in training; here all count.
        split: whose text is read.
        max_tokens: of the split, from its beginning; at least one window of the largest multiple.

    Raises:
        ConfigError: a folder holds no run of a decoder on text, runs have different text, or an argument is out of range.
    """
    problems = _argument_problems(folders, times, gram, split, max_tokens)
    if problems:
        raise ConfigError(problems)
    # evaluation may take long: all runs are opened before it begins
    opened, runs = [_open(each, times, split, max_tokens) for each in folders], _apart(folders)
    texts = {each.corpus.fingerprint: run for each, run in zip(opened, runs, strict=True)}
    if len(texts) > 1:
        raise ConfigError(
            f"{' and '.join(texts.values())} read other text, or by another tokenizer, so that losses are not of the same "
            "tokens: give runs of one text at a time"
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
        problems.append(f"--times {times}: give a power of 2")
    if gram < 2:
        problems.append(f"--gram {gram}: at least 2")
    if max_tokens < 1:
        problems.append(f"--max-tokens {max_tokens}: at least 1")
    counts = Counter(folder.resolve() for folder in folders)
    return problems + [f"{folder}: is given twice" for folder, count in counts.items() if count > 1]


def _apart(folders: Sequence[Path]) -> list[str]:
    """The folders below the one that holds them all."""
    whole = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath([each.parent for each in whole])) if whole else Path()
    return [each.relative_to(shared).as_posix() for each in whole]


def _arms(runs: Sequence[str], configs: Sequence[RunConfig]) -> list[str]:
    """The arm of each run; runs whose configs differ only in the seed are one arm."""
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
    """Nats per token by token frequencies. Each count is one higher, so that no token has probability 0."""
    counts = np.bincount(corpus.stream("train").tokens[:_COUNTED], minlength=corpus.vocab_size) + 1
    return float(-np.log(counts / counts.sum())[corpus.stream(split).tokens[1 : max_tokens + 1]].mean())


def _open(folder: Path, times: int, split: Split, max_tokens: int) -> _Opened:
    run = read_run(folder)
    config = validate(RunConfig, run.config)
    if not isinstance(config.data, TextData):
        raise ConfigError(f"{folder}: this run trained on data {config.data.name!r}; give a run on text")
    model_config, tensors = llama_format.load(model_folder(run))
    model, corpus, length = model_config.build(), config.data.open(), config.data.sequence_length
    copy_tensors(model, tensors)
    available = len(corpus.stream(split).tokens) - 1
    if available < length * times:
        raise ConfigError(
            f"{folder}: the split {split!r} has {available} tokens, and a window of {times} times the training length has "
            f"{length * times}: take another of {', '.join(SPLITS)}, or a smaller --times"
        )
    if max_tokens < length * times:
        raise ConfigError(
            f"--max-tokens {max_tokens}: {folder} was trained on windows of {length} tokens, and one of {times} times as many "
            f"has {length * times}: give at least so many, or a smaller --times"
        )
    return _Opened(config=config, model=model.eval(), corpus=corpus, training_length=length)


@torch.inference_mode()
def _at_length(
    model: Decoder, corpus: TextCorpus, length: int, gram: int, split: Split, max_tokens: int
) -> tuple[AtLength, tuple[Ids, NDArray[np.float64]]]:
    """The measures at a length; for every counted position, the number of tokens before it and the loss at it."""
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
    """Whether the n-gram that ends with each target ended before in the same document of the row, (B, T).

    Args:
        packed: windows.
        gram: n, the target included.
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
        # an n-gram across two documents gets a number of its own, so that it repeats none
        documents = np.where(begins == ends, ends, -2 - places)
        keys = np.column_stack((documents, grams[row]))
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        found[row, gram - 2 :] = first[inverse.reshape(-1)] < places
    return found


def _mean(losses: NDArray[np.float64]) -> Mean:
    return Mean(loss=float(losses.mean()) if len(losses) else float("nan"), count=len(losses))


def as_json(found: Sequence[LongRange]) -> dict[str, Any]:
    """The measures and the environment, for JSON; None for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and value != value else value

    where = environment(torch.device("cpu")).model_dump(mode="json")
    return {"environment": where, "runs": [plain(asdict(each)) for each in found]}


def tables(found: Sequence[LongRange]) -> list[TextTable]:
    """A row for each arm and length, with the mean over its runs and, of several runs, a 95 % interval."""
    rows = [_row(arm, runs, place) for arm, runs in _by_arm(found).items() for place, _ in enumerate(runs[0].lengths)]
    unigram_losses = dict.fromkeys(f"{each.unigram_loss:.4f}" for each in found)
    rows += [["token frequencies", "-", loss, *["-"] * 5] for loss in unigram_losses]
    headers = ["arm, window", "runs", "loss", "of repeated runs", "of the rest", "repeated", "tokens/s", "state"]
    return [TextTable(title="Loss (nats per token) by length of window", headers=headers, rows=rows)]


def _row(arm: str, runs: Sequence[LongRange], place: int) -> list[str]:
    """An arm's row of the table at the length in this place."""
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
    """A PNG of the mean loss of each arm over the number of tokens before.

    The number is in training lengths if these differ between runs.
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
