"""A mixer that is no part of the package: linear attention whose features are the sigmoids of queries and keys."""

from typing import Literal

import torch

from llmeff.attention.kernel import KernelConfig, KernelMixer
from llmeff.attention.norm import at_least_float32
from llmeff.cost import laws


class Sigmoid(KernelConfig):
    name: Literal["outside-sigmoid"] = "outside-sigmoid"

    def build(self, shape):
        return SigmoidMixer(self, shape)

    def features_law(self, shape, tape, query, key, batch):
        query, key = (laws.function(tape, laws.cast(tape, x, "float32"), "output") for x in (query, key))
        return query, key, None

    def cache_bytes(self, shape, num_tokens, number_bytes):
        return 4 * shape.num_heads * shape.head_dim * (shape.head_dim + 1)


class SigmoidMixer(KernelMixer):
    def features(self, query, key, layout, cache):
        return at_least_float32(query).sigmoid(), at_least_float32(key).sigmoid(), None


def formula(mixer, x):
    query, key, value = (
        (x @ mixer.get_parameter(f"{name}_proj.weight").T).unflatten(-1, (-1, 6)) for name in ("q", "k", "v")
    )
    key, value = (own.repeat_interleave(2, dim=1) for own in (key, value))
    features = [1 / (1 + (-own).exp()) for own in (query, key)]
    weights = torch.einsum("tnm,snm->nts", *features).tril()
    mixed = torch.einsum("nts,snv->tnv", weights / weights.sum(-1, keepdim=True), value)
    return mixed.flatten(1) @ mixer.o_proj.weight.T
