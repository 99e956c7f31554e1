"""Windows over the tokens of a split: batches that are a pure function of (seed, step), and evaluation in order."""

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
"""plain: a window is read as one text. documents: its documents do not see one another."""

MASKED = -100
"""A target that is not predicted (torch's `ignore_index`)."""

BLOCK = 4096
"""The order of the windows is computed for so many samples at a time."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of tokens with what each is to predict."""

    tokens: Ids
    """(B, T)."""
    targets: Ids
    """(B, T): the token after each; MASKED where nothing is predicted."""
    positions: Ids | None
    """(B, T): place in the document, or in the part of it that the row holds, from 0. None: place in the row."""
    documents: Ids | None
    """(B, T): tokens see one another only where these agree. None: all do."""
    units: Callable[[], list[str]]
    """The names of the documents that the rows hold, in order."""


@dataclass(frozen=True, kw_only=True)
class EvalBatch(TokenBatch):
    """Rows of evaluation."""

    target_documents: Ids
    """(B, T): which document of the split each target belongs to; -1 where it is masked."""


@functools.lru_cache(maxsize=8)
def _starts(seed: int, epoch: int, block: int, length: int, period: int) -> list[int]:
    """Where the windows of one block of an epoch's samples begin."""
    num_windows = period // length
    slots = np.arange(block * BLOCK, min((block + 1) * BLOCK, num_windows), dtype=np.int64)
    shift = derive(seed, "shift", epoch) % period
    starts: list[int] = ((permuted(slots, num_windows, seed, epoch) * length + shift) % period).tolist()
    return starts


class TrainWindows:
    """Shuffled windows of a stream, read as a ring: its last end token is its first.

    An epoch cuts the ring, from a place drawn for it, into windows of T inputs that do not overlap, and takes them in
    a shuffled order: every token is trained on at most once in an epoch, and all but fewer than T are.

    Args:
        stream: of one split.
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
                f"data.sequence_length: {length} given, but the training split has {self.period} tokens, "
                "less than one window: shorten it or give more text"
            )

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> TokenBatch:
        """Some rows of a step's batch: the same whatever process asks and whatever was asked before.

        Args:
            seed: of the run.
            step: from 0.
            rows: which of the step's rows, within range(global_batch).
            global_batch: rows of a step on all ranks together.
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
        """Positions and documents of the inputs; once round the ring, a document counts as another."""
        first = np.array(starts, dtype=np.int64)[:, None]
        turns, places = np.divmod(first + np.arange(self.length), self.period)
        documents = np.searchsorted(self.stream.starts, places, side="right") - 1
        begins = self.stream.starts[documents] + turns * self.period
        positions = places + turns * self.period - np.maximum(begins, first)
        return positions, documents + turns * len(self.stream.document_bytes)


class EvalWindows:
    """Windows in order that make every token of the documents, and the end token that closes each, a target once.

    A window knows nothing of the one before it. With `max_tokens`, the stream's first so many.

    Args:
        stream: of one split.
        length: T.
        packing: whether documents see one another.
        decode: token ids to text; gives the bytes of a document that `max_tokens` cuts.
        max_tokens: how many targets; None: all.
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
        """(documents,): bytes of the documents evaluated, or of the evaluated part of the last."""
        if self.num_targets < stream.starts[last + 1]:
            part = stream.tokens[stream.starts[last] + 1 : self.num_targets + 1]
            self.document_bytes[last] = len(decode(part).encode())

    @property
    def units(self) -> list[str]:
        """The names of the documents evaluated."""
        return self.stream.units[: len(self.document_bytes)]

    def batch(self, rows: range) -> EvalBatch:
        """Some of the windows, by their places in range(num_windows); the last is filled up with masked targets."""
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
