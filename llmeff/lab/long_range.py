"""What trained language models make of more context than they were trained on, and of what stood before in it."""

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
"""Spans of positions in a training length."""
_COUNTED = 2**24
"""Tokens of the training text whose frequencies are taken."""
_LOGITS = 2**22
"""Numbers of logits that are made at once."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean loss."""

    loss: float
    """Nats per token; NaN of none."""
    count: int
    """Tokens."""


@dataclass(frozen=True, kw_only=True)
class AtLength:
    """What a model does in windows of one length."""

    length: int
    """Tokens of a window."""
    all: Mean
    """Over all tokens."""
    repeated: Mean
    """Over the last tokens of runs of tokens that stood in the same document of the window before: what can be recalled."""
    other: Mean
    """Over the rest."""
    tokens_per_s: float
    """Forward, median over batches."""
    state_bytes: int
    """What decoding keeps of a sequence of so many tokens, in the parameters' format."""


@dataclass(frozen=True, kw_only=True)
class LongRange:
    """What one model does."""

    run: str
    """Its folder, below that of all."""
    arm: str
    """What runs that differ in nothing but their seeds have in common: their name, or where others have it too, the first's
    folder."""
    training_length: int
    """Tokens of a window that it was trained on."""
    unigram_loss: float
    """What the frequencies of the training text's tokens alone come to on the same text, nats per token."""
    lengths: list[AtLength]
    """From the training length on, by doubling."""
    positions: list[tuple[int, Mean]]
    """By how many tokens are seen at least, in windows of the largest length; a quarter of the training length each."""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A run that has ended."""

    config: RunConfig
    model: Decoder
    corpus: TextCorpus
    training_length: int


def long_range(
    folders: Sequence[Path], *, times: int = 4, gram: int = 2, split: Split = "validation", max_tokens: int = 2**17
) -> list[LongRange]:
    """Reads held-out text in windows of 1, 2, 4, ... times what models were trained on.

    Args:
        folders: runs that have ended.
        times: the largest multiple.
        gram: tokens of a run that counts as repeated; 2: bigrams. Arora et al. 2023 (arXiv 2312.04927) leave out bigrams that
            are frequent in training; here all count.
        split: whose text.
        max_tokens: the split's first so many are read; at least a window of the largest multiple.

    Raises:
        ConfigError: a folder holds no such run, or something asked for cannot be.
    """
    problems = []
    if split not in SPLITS:
        problems.append(f"--split {split!r}: there is no such split.{nearest(split, SPLITS)}")
    if times < 1 or times & (times - 1):
        problems.append(f"--times {times}: give a power of 2")
    if gram < 2:
        problems.append(f"--gram {gram}: at least 2")
    if max_tokens < 1:
        problems.append(f"--max-tokens {max_tokens}: at least 1")
    twice = [folder for folder, count in Counter(each.resolve() for each in folders).items() if count > 1]
    problems += [f"{folder}: is given twice" for folder in twice]
    if problems:
        raise ConfigError(problems)
    # all is opened before the first is read, which may take long
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


def _apart(folders: Sequence[Path]) -> list[str]:
    """Names of folders that tell them apart."""
    whole = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath([each.parent for each in whole])) if whole else Path()
    return [each.relative_to(shared).as_posix() for each in whole]


def _arms(runs: Sequence[str], configs: Sequence[RunConfig]) -> list[str]:
    """What each run is one of."""
    alike = [config.model_copy(update={"seed": 0}).model_dump_json() for config in configs]
    first = {own: place for place, own in reversed(list(enumerate(alike)))}
    names = Counter(configs[place].name for place in first.values())
    return [configs[first[own]].name if names[configs[first[own]].name] == 1 else runs[first[own]] for own in alike]


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
        lengths=[own for own, _ in found],
        positions=positions,
    )


def _unigram_loss(corpus: TextCorpus, split: Split, max_tokens: int) -> float:
    """By frequencies plus one each, so that a token that is new has one too."""
    counts = np.bincount(corpus.stream("train").tokens[:_COUNTED], minlength=corpus.vocab_size) + 1
    return float(-np.log(counts / counts.sum())[corpus.stream(split).tokens[1 : max_tokens + 1]].mean())


def _open(folder: Path, times: int, split: Split, max_tokens: int) -> _Opened:
    run = read_run(folder)
    config = validate(RunConfig, run.config)
    if not isinstance(config.data, TextData):
        raise ConfigError(f"{folder}: is a run of data {config.data.name!r}, and what is asked is of text")
    own, tensors = llama_format.load(model_folder(run))
    model, corpus, length = own.build(), config.data.open(), config.data.sequence_length
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
    """The measures, and of every token how many were seen before it, itself excluded, and its loss."""
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
    own = AtLength(
        length=length,
        all=_mean(loss),
        repeated=_mean(loss[hit]),
        other=_mean(loss[~hit]),
        tokens_per_s=statistics.median(rates),
        state_bytes=model.config.cache_bytes(length, next(model.parameters()).itemsize),
    )
    return own, (all_seen, loss)


def _layout(packed: EvalBatch) -> Layout | None:
    if packed.positions is None or packed.documents is None:
        return None
    return Layout(positions=torch.from_numpy(packed.positions), documents=torch.from_numpy(packed.documents))


def repeated(packed: EvalBatch, gram: int) -> NDArray[np.bool_]:
    """(B, T): whether the run of `gram` tokens that ends with the target ended before in the same document of the row.

    Args:
        packed: windows.
        gram: tokens of a run, the target among them.
    """
    whole = np.concatenate((packed.tokens, packed.targets[:, -1:]), axis=1)
    apart = np.zeros_like(packed.tokens) if packed.documents is None else packed.documents
    num_rows, length = packed.tokens.shape
    found = np.zeros((num_rows, length), dtype=bool)
    if length + 1 < gram:
        return found
    runs = np.lib.stride_tricks.sliding_window_view(whole, gram, axis=1)
    for row in range(num_rows):
        begins, ends = apart[row, : length + 2 - gram], apart[row, gram - 2 :]
        places = np.arange(len(ends))
        # a run that begins in one document and ends in another is like none
        own = np.where(begins == ends, ends, -2 - places)
        _, first, inverse = np.unique(np.column_stack((own, runs[row])), axis=0, return_index=True, return_inverse=True)
        found[row, gram - 2 :] = first[inverse.reshape(-1)] < places
    return found


def _mean(losses: NDArray[np.float64]) -> Mean:
    return Mean(loss=float(losses.mean()) if len(losses) else float("nan"), count=len(losses))


def as_json(found: Sequence[LongRange]) -> dict[str, Any]:
    """All that was found, and where; nothing is NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and value != value else value

    where = environment(torch.device("cpu")).model_dump(mode="json")
    return {"environment": where, "runs": [plain(asdict(each)) for each in found]}


def tables(found: Sequence[LongRange]) -> list[TextTable]:
    """The result for people: each arm's mean, and of several runs its 95 % interval."""
    rows = []
    for arm, runs in _by_arm(found).items():
        for place, own in enumerate(runs[0].lengths):
            same = [each.lengths[place] for each in runs]
            rows.append([
                f"{arm}, {own.length} ({own.length // runs[0].training_length} x)",
                str(len(runs)),
                *(_shown([mean.loss for mean in means]) for means in (
                    [each.all for each in same], [each.repeated for each in same], [each.other for each in same]
                )),
                f"{100 * own.repeated.count / own.all.count:.1f} %",
                f"{statistics.median(each.tokens_per_s for each in same):,.0f}",
                show_bytes(own.state_bytes),
            ])  # fmt: skip
    alone = dict.fromkeys(f"{each.unigram_loss:.4f}" for each in found)
    rows += [["token frequencies", "-", loss, *["-"] * 5] for loss in alone]
    headers = ["arm, window", "runs", "loss", "of repeated runs", "of the rest", "repeated", "tokens/s", "state"]
    return [TextTable(title="Loss (nats per token) by length of window", headers=headers, rows=rows)]


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
    """Loss, each arm's mean, over how much is seen, in tokens or, where runs differ in it, in training lengths, as a PNG."""
    lengths = {each.training_length for each in found}
    unit, words = (lengths.pop(), "tokens seen") if len(lengths) == 1 else (1, "training lengths seen")
    places = [unit * (place + 0.5) / FINE for place in range(len(found[0].positions))]
    values = {
        arm: [
            statistics.fmean(own)
            for own in zip(*([mean.loss for _, mean in each.positions] for each in runs), strict=True)
        ]
        for arm, runs in _by_arm(found).items()
    }
    panel = Curves(label="loss (nats per token)", values=values)
    return curves(places, [panel], words, "Longer windows than in training", until=float(unit))
