"""Stored tensors: each once, put back exactly, refused where they do not fit."""

import pytest
import torch
from torch import nn

from llmeff.core.tensors import copy_tensors, stored_tensors


class Module(nn.Module):
    """With everything that a module may hold: a shared parameter, buffers that are saved and not, a frozen weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(3)
        self.norm.weight.requires_grad_(False)
        self.register_buffer("table", torch.randn(2), persistent=False)


def test_each_tensor_is_stored_once():
    assert set(stored_tensors(Module())) == {
        "embedding.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip


def test_stored_and_put_back_is_the_same_module():
    one, other = Module(), Module()
    one.norm(torch.randn(5, 3))
    identity = {name: id(tensor) for name, tensor in stored_tensors(other).items()}
    copy_tensors(other, {name: tensor.clone() for name, tensor in stored_tensors(one).items()})
    for name, tensor in stored_tensors(other).items():
        assert torch.equal(tensor, stored_tensors(one)[name])
        assert id(tensor) == identity[name]
    assert other.head.weight is other.embedding.weight
    assert not torch.equal(one.table, other.table)


def test_missing_and_unexpected_names_are_told():
    tensors = dict(stored_tensors(Module()))
    tensors["norm.scale"] = tensors.pop("norm.weight")
    with pytest.raises(ValueError, match=r"they lack \['norm\.weight'\], and the model lacks \['norm\.scale'\]"):
        copy_tensors(Module(), tensors)


def test_another_shape_is_told_and_broadcasts_into_nothing():
    tensors = dict(stored_tensors(Module())) | {"norm.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"norm\.bias has shape \(1,\), but the model needs \(3,\)"):
        copy_tensors(Module(), tensors)
