"""Assigns documents, or spans of documents, to splits."""

import fractions
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, Self, get_args

from pydantic import model_validator

from llmeff.core.config import Config, Fraction

Split = Literal["train", "calibration", "search", "validation", "test"]
"""What a text or an image may be used for: to train; to calibrate a compressor; to choose settings; to report results; to
report results once."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a source."""

    unit: str
    """Name in the source: the same on every machine, and unique, except that the spans of a document share it."""
    text: str
    split: Split | None = None
    """The split that the source assigns. None: the data's settings choose."""


class Shares(Config):
    """The share of each split; the rest is the training split."""

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
            raise ValueError("the fractions of calibration, search, validation and test leave nothing to train on")
        return self

    def shares(self) -> dict[Split, fractions.Fraction]:
        """The exact share of each split: 0.1 is one tenth, not the nearest binary number."""
        held_out: dict[Split, fractions.Fraction] = {
            split: fractions.Fraction(repr(float(getattr(self, split)))) for split in SPLITS if split != "train"
        }
        return {"train": 1 - sum(held_out.values(), start=fractions.Fraction(0)), **held_out}

    def by_hash(self, text: str) -> Split:
        """Chooses a split by a hash of the text; the shares hold on average."""
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        # Test is last and training fills the start, so no other fraction changes the test split.
        ends = accumulate(self.shares().values())
        return next(split for split, end in zip(SPLITS, ends, strict=True) if place < end * 2**64)


class SplitConfig(Shares):
    """How documents are divided among the splits, by their text; the rest is the training split."""

    by: Literal["document", "span"] = "document"
    """document: each document goes to one split, by a hash of its text. Equal texts share a split whatever their names; the
    shares hold on average. span: each document is cut by characters, in the order train, calibration, search, validation,
    test; suits a corpus of few documents."""

    def assign(self, document: Document) -> Iterator[tuple[Split, Document]]:
        """Yields the non-empty parts of the document with their splits."""
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
