"""Synthetic data for recall: sequences that ask questions about their own earlier tokens.

They test only what the state of a mixer remembers. The supply of training sequences is endless.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from llmeff.core.config import Count, Flag, Integer, Positive
from llmeff.core.seed import derive
from llmeff.data.data import DataConfig
from llmeff.data.packing import MASKED
from llmeff.data.source import fingerprint_of

# B rows, T tokens, P pairs

_BLANK = 0
"""Token that is neither a key nor a value. In induction, it is the trigger token."""
_DRAWING = 2
"""Version of the code that draws rows from a seed. Increase it with every change of the data."""
HELD_OUT = ("validation", "search", "test")
"""Names of the held-out splits, which all have the same number of rows."""


@dataclass(frozen=True, kw_only=True)
class RecallRows:
    """Rows of tokens that contain questions."""

    tokens: NDArray[np.int64]
    """(B, T) token ids."""
    targets: NDArray[np.int64]
    """(B, T): the answer at each token that asks a question, and `MASKED` elsewhere."""


class RecallData(DataConfig):
    """Synthetic tokens for associative recall or induction."""

    name: Literal["recall"] = "recall"
    kind: Literal["mqar", "induction"] = "mqar"
    """mqar: multi-query associative recall (Arora et al. 2023, arXiv 2312.04927). A row starts with pairs of a key and
    a value. Later, each key occurs again and asks for its value. The keys of a row differ; its values may repeat.
    induction (Fu et al. 2022; Gu and Dao 2023): a row contains a trigger token somewhere. It ends with the trigger
    token again, which asks for the token that followed the first trigger token."""
    vocab_size: Count = 256
    """Size of the vocabulary. In mqar, keys are in its lower half and values in its upper half."""
    sequence_length: Count = 64
    """Tokens in a row (T)."""
    pairs: Count = 8
    """mqar only. Pairs in a row (P), which is also the number of questions. A row of induction has one question."""
    recency: Positive = 0.01
    """mqar only. Questions are placed at random. The density of a question's distance d from the pairs is proportional
    to d^(recency - 1), so with 1 all distances are equally likely. If the questions fill all possible places, `recency`
    affects only their order."""
    noise: Flag = True
    """mqar only. Whether the tokens outside of pairs and questions are random. If false, they are all token 0."""
    held_out: Count = 1024
    """Rows in each held-out split."""
    seed: Integer = 0
    """Seed of the held-out rows. Training rows depend on the run's seed instead."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = []
        if self.kind == "mqar":
            if self.vocab_size % 2 or self.vocab_size < 2 * (self.pairs + 1):
                problems.append(
                    f"vocab_size is {self.vocab_size}, but {self.pairs} pairs need an even number of at least "
                    f"{2 * (self.pairs + 1)}"
                )
            if self.sequence_length < 4 * self.pairs:
                problems.append(
                    f"sequence_length is {self.sequence_length}, but {self.pairs} pairs and {self.pairs} questions, "
                    f"with a free token after each question, need at least {4 * self.pairs}"
                )
        else:
            if self.vocab_size < 3 or self.sequence_length < 3:
                problems.append("induction needs a vocab_size and a sequence_length of at least 3")
            fields = type(self).model_fields
            problems += [
                f"{name} is {value}, but induction does not use {name}: leave it out"
                for name in ("pairs", "recency", "noise")
                if (value := getattr(self, name)) != fields[name].default
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def fingerprint(self) -> str:
        """Returns a hash of the settings. Equal data has equal hashes on every machine."""
        return fingerprint_of([_DRAWING, self.model_dump(mode="json")])

    def questions(self) -> int:
        """Returns the number of questions in a row."""
        return self.pairs if self.kind == "mqar" else 1

    def train_rows(self, seed: int, step: int, rows: range) -> RecallRows:
        """Returns rows of a training step. Each is a pure function of (seed, step, row)."""
        return self._drawn([derive(seed, "recall", step, row) for row in rows])

    def held_out_rows(self, split: str, rows: range) -> RecallRows:
        """Returns rows of a held-out split."""
        return self._drawn([derive(self.seed, "recall", split, row) for row in rows])

    def _drawn(self, seeds: list[int]) -> RecallRows:
        """Draws uniform random numbers for each row from its seed, then computes all rows together."""
        draw, num_numbers = (
            (self._mqar, self._num_numbers) if self.kind == "mqar" else (self._induction, self.sequence_length)
        )
        numbers = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(num_numbers) for seed in seeds])
        tokens, targets = draw(numbers)
        return RecallRows(tokens=tokens, targets=targets)

    @property
    def _num_numbers(self) -> int:
        """Number of random numbers that are drawn to make a row of kind "mqar".

        One is drawn for each possible key, each value in the row, each possible place of a question, and each token.
        """
        return self.vocab_size // 2 - 1 + self.pairs + self._num_places + self.sequence_length

    @property
    def _num_places(self) -> int:
        """Number of places where a question may be: every second token, so the token after a question stays free."""
        return (self.sequence_length - 2 * self.pairs) // 2

    def _mqar(self, numbers: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        half, num_pairs, num_places = self.vocab_size // 2, self.pairs, self._num_places
        of_keys, of_values, of_places, of_noise = np.split(
            numbers, np.cumsum([half - 1, num_pairs, num_places]), axis=1
        )
        keys = 1 + of_keys.argsort(axis=1)[:, :num_pairs]
        values = half + (half * of_values).astype(np.int64)
        tokens = (self.vocab_size * of_noise).astype(np.int64) if self.noise else np.full(of_noise.shape, _BLANK)
        tokens[:, 0 : 2 * num_pairs : 2], tokens[:, 1 : 2 * num_pairs : 2] = keys, values
        # Sorting exponential random numbers with these rates samples places by weight, without replacement.
        weights = np.arange(1, num_places + 1, dtype=np.float64) ** (self.recency - 1)
        places = (-np.log1p(-of_places) / weights).argsort(axis=1)[:, :num_pairs]
        asked = 2 * num_pairs + 2 * places
        targets = np.full(tokens.shape, MASKED)
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        return tokens, targets

    def _induction(self, numbers: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = 1 + ((self.vocab_size - 1) * numbers).astype(np.int64)
        called = ((self.sequence_length - 2) * numbers[:, -1]).astype(np.int64)
        rows = np.arange(len(tokens))
        tokens[rows, called] = tokens[:, -1] = _BLANK
        targets = np.full(tokens.shape, MASKED)
        targets[:, -1] = tokens[rows, called + 1]
        return tokens, targets
