"""Windows over the tokens of a split: training batches as a pure function of (seed, step), and evaluation in order."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmeff.core.config import ConfigError
from llmeff.core.seed import derive
from llmeff.data.cache import TokenStream
from llmeff.data.permute import permuted

# B batch, T sequence

Packing = Literal["plain", "documents"]
"""plain: a window is one text. documents: the documents of a window do not attend to one another."""

MASKED = -100
"""A target that is not predicted (torch's `ignore_index`)."""

BLOCK = 4096
"""Number of samples for which the order of windows is computed at a time."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of tokens with their targets."""

    tokens: Ids
    """(B, T)."""
    targets: Ids
    """(B, T): the token after each; MASKED if nothing is predicted."""
    positions: Ids | None
    """(B, T): position from 0 in the document, or in the part of it that the row holds. None: position in the row."""
    documents: Ids | None
    """(B, T): document ids; tokens see only tokens of the same document. None: tokens see the whole row."""
    units: Callable[[], list[str]]
    """Returns the names of the documents in the rows, in order."""


@dataclass(frozen=True, kw_only=True)
class EvalBatch(TokenBatch):
    """Rows for evaluation."""

    target_documents: Ids
    """(B, T): index of the document in the split that each target belongs to; -1 if masked."""


@functools.lru_cache(maxsize=8)
def _starts(seed: int, epoch: int, block: int, length: int, period: int) -> list[int]:
    """Start positions of the windows of one block of an epoch's samples."""
    num_windows = period // length
    slots = np.arange(block * BLOCK, min((block + 1) * BLOCK, num_windows), dtype=np.int64)
    shift = derive(seed, "shift", epoch) % period
    starts: list[int] = ((permuted(slots, num_windows, seed, epoch) * length + shift) % period).tolist()
    return starts


class TrainWindows:
    """Shuffled windows of a stream, which is read as a ring: its last end token is also its first.

    Each epoch cuts the ring, from a random position, into non-overlapping windows of T inputs, and takes them in shuffled
    order. An epoch trains on every token at most once, and leaves out fewer than T tokens.

    Args:
        stream: the tokens of one split.
        length: T.
        packing: whether documents see one another.

    Raises:
        ConfigError: the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, length: int, packing: Packing):
        self.stream, self.length, self.packing = stream, length, packing
        self.period = len(stream.tokens) - 1
        self.num_windows = self.period // length
        if self.num_windows == 0:
            raise ConfigError(
                f"data.sequence_length: {length} given, but the training split has only {self.period} tokens, "
                "less than one window: shorten it or give more text"
            )

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> TokenBatch:
        """Returns rows of a step's batch. They depend neither on the process nor on earlier calls.

        Args:
            seed: the run's seed.
            step: counted from 0.
            rows: which of the step's rows, within range(global_batch).
            global_batch: rows of a step over all ranks.
        """
        starts = [self._start(seed, step * global_batch + row) for row in rows]
        window = np.empty((len(starts), self.length + 1), dtype=np.int64)
        for row, start in enumerate(starts):
            whole = self.stream.tokens[start : start + self.length + 1]
            window[row, : len(whole)] = whole
            if len(whole) <= self.length:  # the last end token is the ring's first: go on after it
                window[row, len(whole) :] = self.stream.tokens[1 : self.length + 2 - len(whole)]
        positions, documents = self._places(starts) if self.packing == "documents" else (None, None)
        return TokenBatch(
            tokens=np.ascontiguousarray(window[:, :-1]),
            targets=np.ascontiguousarray(window[:, 1:]),
            positions=positions,
            documents=documents,
            units=lambda: _units(self.stream, self._places(starts)[1] % len(self.stream.document_bytes)),
        )

    def _start(self, seed: int, sample: int) -> int:
        epoch, slot = divmod(sample, self.num_windows)
        return _starts(seed, epoch, slot // BLOCK, self.length, self.period)[slot % BLOCK]

    def _places(self, starts: list[int]) -> tuple[Ids, Ids]:
        """Positions and documents of the inputs; after a turn of the ring, the same document counts as another one."""
        first = np.array(starts, dtype=np.int64)[:, None]
        turns, places = np.divmod(first + np.arange(self.length), self.period)
        documents = np.searchsorted(self.stream.starts, places, side="right") - 1
        begins = self.stream.starts[documents] + turns * self.period
        positions = places + turns * self.period - np.maximum(begins, first)
        return positions, documents + turns * len(self.stream.document_bytes)


class EvalWindows:
    """Windows in order; every token of the documents, and the end token after each, is a target exactly once.

    Windows are independent: none sees the tokens of the one before.

    Args:
        stream: the tokens of one split.
        length: T.
        packing: whether documents see one another.
        decode: converts token ids to text, to count the bytes of a document that `max_tokens` cuts.
        max_tokens: number of targets, from the start of the stream. None: all.
    """

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        packing: Packing,
        decode: Callable[[Iterable[int]], str],
        max_tokens: int | None = None,
    ):
        self.stream, self.length, self.packing = stream, length, packing
        self.num_targets = min(len(stream.tokens) - 1, max_tokens or len(stream.tokens))
        self.num_windows = -(-self.num_targets // length)
        last = int(np.searchsorted(stream.starts, self.num_targets)) - 1
        self.document_bytes: Ids = np.array(stream.document_bytes[: last + 1])
        """(documents,): bytes of the evaluated documents; of the last, only the evaluated part counts."""
        if self.num_targets < stream.starts[last + 1]:
            part = stream.tokens[stream.starts[last] + 1 : self.num_targets + 1]
            self.document_bytes[last] = len(decode(part).encode())

    @property
    def units(self) -> list[str]:
        """Names of the evaluated documents."""
        return self.stream.units[: len(self.document_bytes)]

    def batch(self, rows: range) -> EvalBatch:
        """Returns the windows at these indices, within range(num_windows); the last is padded with masked targets."""
        first = np.array(rows, dtype=np.int64)[:, None] * self.length
        places = first + np.arange(self.length)
        inside = places < self.num_targets
        places = np.where(inside, places, self.num_targets - 1)
        stream = self.stream
        documents = np.searchsorted(stream.starts, places, side="right") - 1
        apart = self.packing == "documents"
        return EvalBatch(
            tokens=stream.tokens[places].astype(np.int64),
            targets=np.where(inside, stream.tokens[places + 1].astype(np.int64), MASKED),
            positions=places - np.maximum(stream.starts[documents], first) if apart else None,
            documents=np.where(inside, documents, -1) if apart else None,
            units=lambda: _units(stream, documents),
            target_documents=np.where(inside, documents, -1),
        )


def _units(stream: TokenStream, documents: Ids) -> list[str]:
    return [stream.units[document] for document in dict.fromkeys(documents.ravel().tolist())]
