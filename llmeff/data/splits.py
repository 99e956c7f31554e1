"""Splits of the data, and the assignment of documents or spans of documents to them."""

import fractions
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, Self, get_args

from pydantic import model_validator

from llmeff.core.config import Config, Fraction

Split = Literal["train", "calibration", "search", "validation", "test"]
"""Use of a text or an image. train: training. calibration: calibration of a compressor. search: choice of settings.
validation: reported results. test: results that are reported only once."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text document of a source."""

    unit: str
    """Name of the document in the source. It is the same on every machine. It is unique, except that the spans of a
    document share it."""
    text: str
    split: Split | None = None
    """Split that the source assigns. None if `data.splits` chooses it."""


class Shares(Config):
    """Share of each held-out split. The rest is the training split."""

    calibration: Fraction = 0.01
    """Share of the data."""
    search: Fraction = 0.02
    """Share of the data."""
    validation: Fraction = 0.05
    """Share of the data."""
    test: Fraction = 0.05
    """Share of the data."""

    @model_validator(mode="after")
    def _train_has_a_share(self) -> Self:
        if self.shares()["train"] <= 0:
            raise ValueError(
                "calibration, search, validation and test must sum to less than 1: the rest is the training split"
            )
        return self

    def shares(self) -> dict[Split, fractions.Fraction]:
        """Returns the exact share of each split: 0.1 is one tenth, not the nearest binary number."""
        held_out: dict[Split, fractions.Fraction] = {
            split: fractions.Fraction(repr(float(getattr(self, split)))) for split in SPLITS if split != "train"
        }
        return {"train": 1 - sum(held_out.values(), start=fractions.Fraction(0)), **held_out}

    def by_hash(self, text: str) -> Split:
        """Chooses a split by a hash of the text, so the shares hold on average."""
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        # The test split is last and the training split first, so other shares do not change the test split.
        ends = accumulate(self.shares().values())
        return next(split for split, end in zip(SPLITS, ends, strict=True) if place < end * 2**64)


class SplitConfig(Shares):
    """Division of documents among the splits. All text outside of the held-out splits is the training split."""

    by: Literal["document", "span"] = "document"
    """document: a hash of a document's text chooses its split. Documents with equal text are in the same split,
    whatever their names, and the shares hold on average. span: each document is cut into spans of characters, in the
    order train, calibration, search, validation, test. This suits a corpus of few documents."""

    def assign(self, document: Document) -> Iterator[tuple[Split, Document]]:
        """Yields the non-empty parts of a document, each with its split."""
        if document.split is not None:
            parts = [(document.split, document)]
        elif self.by == "document":
            parts = [(self.by_hash(document.text), document)]
        else:
            ends = [int(end * len(document.text)) for end in accumulate(self.shares().values())]
            parts = [
                (split, replace(document, text=document.text[start:end]))
                for split, (start, end) in zip(SPLITS, pairwise([0, *ends]), strict=True)
            ]
        return ((split, part) for split, part in parts if part.text)
