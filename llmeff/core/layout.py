"""The layout of a batch: each token's position, its document, and whether it is padding."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

# B batch, T queries, S keys, R rotary angles (half of head_dim)

Tables = TypeVar("Tables")


def begins_in(documents: Tensor) -> Tensor:
    """Returns a (B, T) bool tensor: True at the first token of each document. A document's tokens must be adjacent."""
    return torch.nn.functional.pad(documents.diff(dim=-1) != 0, (1, 0), value=True)


def places_in(documents: Tensor) -> Tensor:
    """Returns a (B, T) tensor: each token's index in its document, from 0. A document's tokens must be adjacent."""
    places = torch.arange(documents.shape[-1], device=documents.device)[None]
    return places - torch.where(begins_in(documents), places, 0).cummax(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions, documents and padding of a batch, for the mixers.

    Built once per forward pass and shared by all layers, as are the rotary tables and masks that are computed from it.
    """

    positions: Tensor
    """(B, T) or (1, T) int64: each token's index in its document, from 0."""
    documents: Tensor | None = None
    """(B, T) int64: document ids. Only tokens of equal id see each other. None if each row is one document."""
    padding: Tensor | None = None
    """(B, S) bool over cached and new tokens: False at padding, True at real tokens. None if there is no padding."""
    past: int = 0
    """Number of cached tokens before the first token of this batch."""
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _masks: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _tables: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @staticmethod
    def plain(length: int, device: torch.device, past: int = 0) -> "Layout":
        """Returns a layout with one unpadded document per row: `length` new tokens after `past` cached tokens."""
        positions = torch.arange(past, past + length, device=device)[None]
        return Layout(positions=positions, past=past)

    @property
    def is_plain(self) -> bool:
        """Whether every row is one document without padding."""
        return self.documents is None and self.padding is None

    @property
    def is_padding(self) -> Tensor | None:
        """(B, T) bool over the new tokens: True at padding tokens. The inverse of `padding`. None if there is no padding."""
        return None if self.padding is None else ~self.padding[:, self.past : self.past + self.positions.shape[-1]]

    def cleared(self, x: Tensor) -> Tensor:
        """Returns x, of shape (B, T, .), with zeros at padding tokens."""
        is_padding = self.is_padding
        return x if is_padding is None else x.masked_fill(is_padding[..., None], 0)

    def places(self) -> Tensor:
        """Returns each token's index among the real tokens of its document, -1 at padding: (B or 1, past + T)."""
        num_tokens = self.past + self.positions.shape[-1]
        if self.documents is not None:
            places = self.positions
        elif self.padding is not None:
            places = self.padding[:, :num_tokens].cumsum(-1) - 1
        else:
            return torch.arange(num_tokens, device=self.positions.device)[None]
        return places if self.padding is None else places.masked_fill(~self.padding[:, :num_tokens], -1)

    def tables(self, key: Hashable, make: Callable[[], Tables]) -> Tables:
        """Returns tables that a mixer computes from the layout. They are computed once per key, for all layers.

        Args:
            key: key of the tables. It starts with the mixer's name.
            make: computes the tables.
        """
        if key not in self._tables:
            self._tables[key] = make()
        return cast(Tables, self._tables[key])

    def rotary(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Returns the cosines and the sines of the rotary angles, float32, each (B or 1, 1, T, head_dim).

        Position p rotates the pair i of dimensions by the angle p * theta^(-2i / head_dim) (RoFormer, Su et al. 2021,
        equation 15). Pair i is the dimensions i and i + head_dim / 2, as in transformers' Llama.
        """
        key = (head_dim, theta)
        if key not in self._rotary:
            exponents = torch.arange(0, head_dim, 2, device=self.positions.device).float() / head_dim
            angles_BTR = self.positions[..., None].float() * (1.0 / theta**exponents)
            angles = torch.cat((angles_BTR, angles_BTR), dim=-1)[:, None]
            self._rotary[key] = angles.cos(), angles.sin()
        return self._rotary[key]

    def mask(self, num_keys: int) -> Tensor | None:
        """Returns a (B or 1, 1, T, num_keys) bool mask: True where a query sees a key.

        Returns None for a plain causal mask, without documents, padding or cached tokens.

        A query that would see no key, such as left padding, sees all keys instead. Its output is not used, but a
        softmax over no keys would be NaN.
        """
        if num_keys not in self._masks:
            self._masks[num_keys] = self._make_mask(num_keys)
        return self._masks[num_keys]

    def bias(self, num_keys: int, dtype: torch.dtype) -> Tensor | None:
        """Returns `mask` as a bias to add to the scores: 0 where a query sees a key, minus infinity elsewhere.

        Like `mask`, it is None for a plain causal mask. Given a boolean mask, torch's attention would compute this bias
        in every layer and save each copy for backward. Here it is computed once.
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
            if missing > 0:  # a cache of fixed size has slots that are not filled yet
                known = torch.nn.functional.pad(known, (0, missing))
            sees = sees & known
            sees = sees | ~sees.any(dim=-1, keepdim=True)
        return sees
