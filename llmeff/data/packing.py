"""Windows over the tokens of a split: shuffled batches for training, and windows in order for evaluation.

The rows of a training step are a pure function of (seed, step).
"""

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
"""plain: tokens attend to all earlier tokens of the window. documents: tokens attend only within their document."""

MASKED = -100
"""Target of a position that is not predicted (torch's `ignore_index`)."""

BLOCK = 4096
"""Number of windows whose shuffled order is computed and cached at a time."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """A batch of token sequences (rows) with their targets."""

    tokens: Ids
    """(B, T) token ids."""
    targets: Ids
    """(B, T): the next token after each token, or MASKED if it is not predicted."""
    positions: Ids | None
    """(B, T): position of each token, counted from 0 at the first token of its document in the row. None if positions
    are counted from the start of the row."""
    documents: Ids | None
    """(B, T): id of each token's document. Tokens attend only to tokens of the same document. None if there is no
    document mask."""
    units: Callable[[], list[str]]
    """Returns the names of the documents in the rows, in order."""


@dataclass(frozen=True, kw_only=True)
class EvalBatch(TokenBatch):
    """A batch for evaluation."""

    target_documents: Ids
    """(B, T): index in the split of the document to which each target belongs; -1 if the target is masked."""


@functools.lru_cache(maxsize=8)
def _starts(seed: int, epoch: int, block: int, length: int, period: int) -> list[int]:
    """Returns the stream indices where the windows of one block start. A block has up to `BLOCK` windows."""
    num_windows = period // length
    slots = np.arange(block * BLOCK, min((block + 1) * BLOCK, num_windows), dtype=np.int64)
    shift = derive(seed, "shift", epoch) % period
    starts: list[int] = ((permuted(slots, num_windows, seed, epoch) * length + shift) % period).tolist()
    return starts


class TrainWindows:
    """Shuffled training windows of a stream.

    The stream is read as a ring: its last end token is also its first. Each epoch cuts the ring, from a random
    position, into non-overlapping windows of T input tokens, and shuffles the windows. An epoch uses every token at
    most once, and leaves out fewer than T tokens.

    Args:
        stream: the tokens of one split.
        length: tokens in a window (T).
        packing: whether tokens attend to other documents of their window, see `Packing`.

    Raises:
        ConfigError: the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, length: int, packing: Packing):
        self.stream, self.length, self.packing = stream, length, packing
        self.period = len(stream.tokens) - 1
        self.num_windows = self.period // length
        if self.num_windows == 0:
            raise ConfigError(
                f"data.sequence_length is {length}, but the training split has only {self.period} tokens, less than "
                "one window. Set a shorter length or give more text"
            )

    def batch(self, seed: int, step: int, rows: range, global_batch: int) -> TokenBatch:
        """Returns some rows of a step's global batch. They do not depend on the process or on earlier calls.

        Args:
            seed: the run's seed.
            step: index of the step, from 0.
            rows: indices of the rows, within range(global_batch).
            global_batch: number of rows in a step, over all ranks.
        """
        starts = [self._start(seed, step * global_batch + row) for row in rows]
        window = np.empty((len(starts), self.length + 1), dtype=np.int64)
        for row, start in enumerate(starts):
            whole = self.stream.tokens[start : start + self.length + 1]
            window[row, : len(whole)] = whole
            if len(whole) <= self.length:  # the last end token is also the ring's first: continue after it
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
        """Returns the positions and document ids of the input tokens of windows that begin at `starts`.

        A window that reaches the end of the stream continues at its beginning. From there on, documents get new ids,
        so that the end and the beginning of the same document stay separate.
        """
        first = np.array(starts, dtype=np.int64)[:, None]
        turns, places = np.divmod(first + np.arange(self.length), self.period)
        documents = np.searchsorted(self.stream.starts, places, side="right") - 1
        begins = self.stream.starts[documents] + turns * self.period
        positions = places + turns * self.period - np.maximum(begins, first)
        return positions, documents + turns * len(self.stream.document_bytes)


class EvalWindows:
    """Evaluation windows of a stream, in order.

    Every token of the documents, and the end token after each document, is a target exactly once. The tokens of a
    window attend only to tokens of the same window.

    Args:
        stream: the tokens of one split.
        length: tokens in a window (T).
        packing: whether tokens attend to other documents of their window, see `Packing`.
        decode: converts token ids to text. It is needed to count the bytes of a document that `max_tokens` cuts short.
        max_tokens: number of tokens to use as targets, from the start of the stream. None for all.
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
        """(documents,): bytes of each evaluated document. If the last one is cut, only its evaluated part counts."""
        if self.num_targets < stream.starts[last + 1]:
            part = stream.tokens[stream.starts[last] + 1 : self.num_targets + 1]
            self.document_bytes[last] = len(decode(part).encode())

    @property
    def units(self) -> list[str]:
        """Names of the evaluated documents."""
        return self.stream.units[: len(self.document_bytes)]

    def batch(self, rows: range) -> EvalBatch:
        """Returns the windows with the given indices, which are within range(num_windows).

        The last window is padded with masked targets.
        """
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
