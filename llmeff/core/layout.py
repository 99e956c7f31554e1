"""Where each token of a batch is: its position, its document, and whether it is padding."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

# B batch, T queries, S keys, R rotary angles (half a head)

Tables = TypeVar("Tables")


def begins_in(documents: Tensor) -> Tensor:
    """(B, T) bool: whether each token is the first of its document in the row. A document's tokens must be adjacent."""
    return torch.nn.functional.pad(documents.diff(dim=-1) != 0, (1, 0), value=True)


def places_in(documents: Tensor) -> Tensor:
    """(B, T): each token's place in its document, from 0. A document's tokens must be adjacent."""
    places = torch.arange(documents.shape[-1], device=documents.device)[None]
    return places - torch.where(begins_in(documents), places, 0).cummax(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a mixer must know about a batch besides its activations.

    Built once per forward pass and shared by all layers. Tables that layers have in common are made once and kept.
    """

    positions: Tensor
    """(B, T) or (1, T) int64: each token's place in its document, from 0."""
    documents: Tensor | None = None
    """(B, T) int64: tokens see each other only if these are equal. None: one document per row."""
    padding: Tensor | None = None
    """(B, S) bool over cached and new tokens, False for padding. None: no padding."""
    past: int = 0
    """How many tokens the cache holds before this batch's first."""
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _masks: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _tables: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @staticmethod
    def plain(length: int, device: torch.device, past: int = 0) -> "Layout":
        """One unpadded document per row: `length` tokens after `past` cached ones."""
        positions = torch.arange(past, past + length, device=device)[None]
        return Layout(positions=positions, past=past)

    @property
    def is_plain(self) -> bool:
        """Whether every row is one document without padding."""
        return self.documents is None and self.padding is None

    @property
    def is_padding(self) -> Tensor | None:
        """(B, T) bool of the new tokens, True for padding; None if there is none."""
        return None if self.padding is None else ~self.padding[:, self.past : self.past + self.positions.shape[-1]]

    def cleared(self, x: Tensor) -> Tensor:
        """(B, T, .) with zeros at padding."""
        is_padding = self.is_padding
        return x if is_padding is None else x.masked_fill(is_padding[..., None], 0)

    def places(self) -> Tensor:
        """(B or 1, past + T): each token's place among the real tokens of its document; -1 for padding."""
        num_tokens = self.past + self.positions.shape[-1]
        if self.documents is not None:
            places = self.positions
        elif self.padding is not None:
            places = self.padding[:, :num_tokens].cumsum(-1) - 1
        else:
            return torch.arange(num_tokens, device=self.positions.device)[None]
        return places if self.padding is None else places.masked_fill(~self.padding[:, :num_tokens], -1)

    def tables(self, key: Hashable, make: Callable[[], Tables]) -> Tables:
        """Tables that a mixer derives from the layout. All layers with that mixer share them; keys start with its name."""
        if key not in self._tables:
            self._tables[key] = make()
        return cast(Tables, self._tables[key])

    def rotary(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles, float32, each (B or 1, 1, T, head_dim).

        Position p turns dimension pair i by p * theta^(-2i / head_dim) (RoFormer, Su et al. 2021, equation 15); the
        pairs are (i, i + head_dim / 2), the layout of transformers' Llama.
        """
        key = (head_dim, theta)
        if key not in self._rotary:
            exponents = torch.arange(0, head_dim, 2, device=self.positions.device).float() / head_dim
            angles_BTR = self.positions[..., None].float() * (1.0 / theta**exponents)
            angles = torch.cat((angles_BTR, angles_BTR), dim=-1)[:, None]
            self._rotary[key] = angles.cos(), angles.sin()
        return self._rotary[key]

    def mask(self, num_keys: int) -> Tensor | None:
        """Which keys each query sees, (B or 1, 1, T, num_keys) bool; None means plain causal attention.

        A padding query sees nothing, so it is allowed to see every key: nobody uses its output, and a softmax over nothing
        would be NaN.
        """
        if num_keys not in self._masks:
            self._masks[num_keys] = self._make_mask(num_keys)
        return self._masks[num_keys]

    def bias(self, num_keys: int, dtype: torch.dtype) -> Tensor | None:
        """`mask` as a term to add to the scores: 0 where a query sees a key, else minus infinity.

        Given a boolean mask, attention would make this term in every layer and keep each for backward. Here it is made once.
        """
        mask = self.mask(num_keys)
        if mask is not None and (num_keys, dtype) not in self._biases:
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            self._biases[num_keys, dtype] = zeros.masked_fill_(~mask, -torch.inf)
        return self._biases.get((num_keys, dtype))

    def _make_mask(self, num_keys: int) -> Tensor | None:
        num_queries = self.positions.shape[-1]
        if self.is_plain and num_keys == num_queries:
            return None
        device = self.positions.device
        query = torch.arange(self.past, self.past + num_queries, device=device)[:, None]
        sees = (torch.arange(num_keys, device=device)[None] <= query)[None, None]
        if self.documents is not None:
            sees = sees & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        if self.padding is not None:
            known = self.padding[:, None, None, :num_keys]
            missing = num_keys - known.shape[-1]
            if missing > 0:  # a cache of fixed size has room that no token fills yet
                known = torch.nn.functional.pad(known, (0, missing))
            sees = sees & known
            sees = sees | ~sees.any(dim=-1, keepdim=True)
        return sees
