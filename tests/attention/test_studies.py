"""The studies of mixers that come with it compare what can be compared."""

import pytest
import torch

from llmeff.attention import MixerConfig
from llmeff.recipes import SWEEPS


def models(name):
    """Each arm's, with a vocabulary."""
    sweep = SWEEPS[name]()
    cell = dict.fromkeys(sweep.axes)
    found = {arm: sweep.run_config(arm, cell, sweep.first_trial(arm), 0).model for arm in sweep.arms}
    return {arm: model.model_copy(update={"vocab_size": 65}) for arm, model in found.items()}


@pytest.mark.parametrize("name", ["recall", "attention"])
def test_every_mixer_is_an_arm_of_its_own(name):
    alone = {
        arm: {model.layer_mixer(index).name for index in range(model.num_layers)} for arm, model in models(name).items()
    }
    assert {arm for arm, names in alone.items() if names == {arm}} == set(MixerConfig.registry.names())


def test_models_of_text_have_equal_parameters():
    counts = {}
    for arm, model in models("attention").items():
        with torch.device("meta"):
            counts[arm] = sum(parameter.numel() for parameter in model.build().parameters())
    assert max(counts.values()) < 1.02 * min(counts.values())
    assert counts["softmax"] * 0.99 < min(counts.values())
    assert max(counts.values()) < 1.01 * counts["softmax"]


@pytest.mark.parametrize("name", ["recall", "attention"])
def test_states_have_equal_sizes(name):
    """Numbers of 0 bytes leave the states of sums alone, without keys and values or the tokens of short convolutions.

    A window's are its keys and values, without the places of its tokens.
    """
    arms = models(name)
    window = arms.pop("sliding")
    square = 4 * window.num_heads * window.head_width**2
    sizes = [
        (arm, model.layer_mixer(index).cache_bytes(model.mixer_shape(index), 10**4, 0))
        for arm, model in arms.items()
        for index in range(model.num_layers)
    ]
    assert {arm for arm, size in sizes if not size} == {"softmax", "mla", *(arm for arm in arms if "+" in arm)}
    # sums beside a kernel's state
    assert all(square <= size < (1 + 1.1 / window.head_width) * square for _, size in sizes if size)
    keys_and_values = window.cache_bytes(10**4, 4) - window.cache_bytes(10**4, 0)
    assert 0.9 * square < keys_and_values / window.num_layers <= square
