"""Sequences that ask for what stood in them before, drawn without end: what a mixer's state can remember, and nothing else."""

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
"""The token that is neither key nor value; of induction, the one that calls."""
_DRAWING = 2
"""Counts how rows have been drawn from a seed: where that changes, the data are others."""
HELD_OUT = ("validation", "search", "test")
"""Splits besides training, of as many rows each."""


@dataclass(frozen=True, kw_only=True)
class RecallRows:
    """Rows of questions."""

    tokens: NDArray[np.int64]
    """(B, T)."""
    targets: NDArray[np.int64]
    """(B, T): the answer at the token that asks, else `MASKED`."""


class RecallData(DataConfig):
    """Associative recall or induction, as synthetic tokens."""

    name: Literal["recall"] = "recall"
    kind: Literal["mqar", "induction"] = "mqar"
    """mqar: pairs of key and value, and then each key again, which asks for its value (multi-query associative recall, Arora
    et al. 2023, arXiv 2312.04927); keys of a row differ, values may be alike. induction: a token that calls, one after it,
    and at the end the call again, which asks for the other (Fu et al. 2022; Gu and Dao 2023)."""
    vocab_size: Count = 256
    """V. Of mqar, the lower half are keys and the upper half values."""
    sequence_length: Count = 64
    """T, tokens of a row."""
    pairs: Count = 8
    """P, of mqar: pairs in a row. Of induction a row has one."""
    recency: Positive = 0.01
    """Of mqar: the distance of a question from the pairs has a density that falls with its power `recency - 1`; 1: all
    distances alike. Where a row has no place to spare, it tells only in which order keys are asked for."""
    noise: Flag = True
    """Of mqar: what is neither a pair nor a question is a random token; else always token 0."""
    held_out: Count = 1024
    """Rows of each held-out split."""
    seed: Integer = 0
    """Of the held-out rows; training rows follow from the run's."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = []
        if self.kind == "mqar":
            if self.vocab_size % 2 or self.vocab_size < 2 * (self.pairs + 1):
                problems.append(
                    f"vocab_size is {self.vocab_size}: {self.pairs} pairs need an even one of at least {2 * (self.pairs + 1)}"
                )
            if self.sequence_length < 4 * self.pairs:
                problems.append(
                    f"sequence_length is {self.sequence_length}: {self.pairs} pairs and as many questions, with a place after "
                    f"each, need at least {4 * self.pairs}"
                )
        else:
            if self.vocab_size < 3 or self.sequence_length < 3:
                problems.append("induction needs a vocab_size and a sequence_length of at least 3")
            fields = type(self).model_fields
            problems += [
                f"{name} is {value}, but induction has none: leave it out"
                for name in ("pairs", "recency", "noise")
                if (value := getattr(self, name)) != fields[name].default
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def fingerprint(self) -> str:
        """Equal data have equal ones on every machine."""
        return fingerprint_of([_DRAWING, self.model_dump(mode="json")])

    def questions(self) -> int:
        """Answers that a row asks for."""
        return self.pairs if self.kind == "mqar" else 1

    def train_rows(self, seed: int, step: int, rows: range) -> RecallRows:
        """Rows of a step, a pure function of (seed, step, row)."""
        return self._drawn([derive(seed, "recall", step, row) for row in rows])

    def held_out_rows(self, split: str, rows: range) -> RecallRows:
        """Rows of a held-out split."""
        return self._drawn([derive(self.seed, "recall", split, row) for row in rows])

    def _drawn(self, seeds: list[int]) -> RecallRows:
        """Each row from uniform numbers of its own; what they come to, for all rows together."""
        draw, num_numbers = (
            (self._mqar, self._num_numbers) if self.kind == "mqar" else (self._induction, self.sequence_length)
        )
        numbers = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(num_numbers) for seed in seeds])
        tokens, targets = draw(numbers)
        return RecallRows(tokens=tokens, targets=targets)

    @property
    def _num_numbers(self) -> int:
        """Of an mqar row: one for each possible key, for each value, for each place of a question, and for each token."""
        return self.vocab_size // 2 - 1 + self.pairs + self._num_places + self.sequence_length

    @property
    def _num_places(self) -> int:
        """Where a question may stand: at every second place, so that the place after each is free for an answer."""
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
        # places are drawn one after the other by their weights: the order in which clocks of these rates ring first
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
