"""Where each token of a batch stands: its position, its document, and whether it is padding."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

# B batch, T queries, S keys, R rotary angles (half a head)

Tables = TypeVar("Tables")


def begins_in(documents: Tensor) -> Tensor:
    """(B, T), of documents whose tokens are neighbours, to whether each token is the first of its own in the row."""
    return torch.nn.functional.pad(documents.diff(dim=-1) != 0, (1, 0), value=True)


def places_in(documents: Tensor) -> Tensor:
    """(B, T), of documents whose tokens are neighbours, to each token's place in its own, from 0."""
    places = torch.arange(documents.shape[-1], device=documents.device)[None]
    return places - torch.where(begins_in(documents), places, 0).cummax(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a mixer must know of a batch beside its activations.

    Built once a forward pass and shared by all layers; tables that layers have in common are made once and kept.
    """

    positions: Tensor
    """(B, T) or (1, T) int64: each token's place in its document, from 0."""
    documents: Tensor | None = None
    """(B, T) int64: tokens see one another only where these agree. None: one document a row."""
    padding: Tensor | None = None
    """(B, S) bool over cached and new tokens, False where a token is padding. None: none is."""
    past: int = 0
    """How many tokens lie in the cache before this batch's first."""
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _masks: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _tables: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @staticmethod
    def plain(length: int, device: torch.device, past: int = 0) -> "Layout":
        """One unpadded document a row, `length` tokens after `past` cached ones."""
        positions = torch.arange(past, past + length, device=device)[None]
        return Layout(positions=positions, past=past)

    @property
    def is_plain(self) -> bool:
        """Whether rows are one document each, without padding."""
        return self.documents is None and self.padding is None

    @property
    def is_padding(self) -> Tensor | None:
        """(B, T) bool of the new tokens, True where one is padding; None where none is."""
        return None if self.padding is None else ~self.padding[:, self.past : self.past + self.positions.shape[-1]]

    def cleared(self, x: Tensor) -> Tensor:
        """(B, T, .) with zeros for padding."""
        is_padding = self.is_padding
        return x if is_padding is None else x.masked_fill(is_padding[..., None], 0)

    def places(self) -> Tensor:
        """(B or 1, past + T): each token's place among the real tokens of its document, -1 where it is padding."""
        num_tokens = self.past + self.positions.shape[-1]
        if self.documents is not None:
            places = self.positions
        elif self.padding is not None:
            places = self.padding[:, :num_tokens].cumsum(-1) - 1
        else:
            return torch.arange(num_tokens, device=self.positions.device)[None]
        return places if self.padding is None else places.masked_fill(~self.padding[:, :num_tokens], -1)

    def tables(self, key: Hashable, make: Callable[[], Tables]) -> Tables:
        """What a mixer makes of the layout, for all its layers; a key begins with the mixer's name."""
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
        """Which keys each query sees, (B or 1, 1, T, num_keys) bool; None where plain causal attention is meant.

        A query that is padding, and so sees nothing, is let see every key: its output is used by nobody, and a softmax
        over nothing would be NaN.
        """
        if num_keys not in self._masks:
            self._masks[num_keys] = self._make_mask(num_keys)
        return self._masks[num_keys]

    def bias(self, num_keys: int, dtype: torch.dtype) -> Tensor | None:
        """`mask` as a summand of the scores: 0 where a query sees a key, else minus infinity.

        Attention would make it from a boolean mask in every layer, and keep each for backward; here it is made once.
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
