"""Which split a document, or a span of one, belongs to."""

import fractions
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, Self, get_args

from pydantic import model_validator

from llmeff.core.config import Config, Fraction

Split = Literal["train", "calibration", "search", "validation", "test"]
"""What a text or an image may be used for: training; calibrating a compressor; choosing settings; reporting; reporting
once."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a source."""

    unit: str
    """Its name in the source: the same on every machine, unique but for the spans of one document."""
    text: str
    split: Split | None = None
    """The split that the source itself names; None: the data's settings choose."""


class Shares(Config):
    """How much goes to each split; what the fractions leave is trained on."""

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
        """Each split's share, exact: 0.1 is a tenth, not the nearest binary number."""
        held_out: dict[Split, fractions.Fraction] = {
            split: fractions.Fraction(repr(float(getattr(self, split)))) for split in SPLITS if split != "train"
        }
        return {"train": 1 - sum(held_out.values(), start=fractions.Fraction(0)), **held_out}

    def by_hash(self, text: str) -> Split:
        """A text's split: for many texts, the shares hold on average."""
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        # Test comes last, training takes up what is left before: no other fraction changes what is in the test split.
        ends = accumulate(self.shares().values())
        return next(split for split, end in zip(SPLITS, ends, strict=True) if place < end * 2**64)


class SplitConfig(Shares):
    """How documents are shared out among the splits, by their text; what the fractions leave is trained on."""

    by: Literal["document", "span"] = "document"
    """document: whole documents, by a hash of their text, so that equal texts fall in one split whatever their names;
    the fractions hold on average. span: every document is cut in order train, calibration, search, validation, test,
    by characters; for a corpus of few documents."""

    def assign(self, document: Document) -> Iterator[tuple[Split, Document]]:
        """The document's parts that are not empty, with their splits."""
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
