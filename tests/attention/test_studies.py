"""The studies of mixers that come with it compare what can be compared."""

import pytest
import torch

from llmeff.attention import MixerConfig
from llmeff.config.recipes import SWEEPS


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


def test_mixers_that_learn_to_forget_are_also_there_with_slow_decays():
    """Those twins differ in how they begin, and in nothing else."""
    arms = models("recall")
    slow = {arm.removesuffix(", slow decay"): model.mixer for arm, model in arms.items() if "slow" in arm}
    assert set(slow) == {"gla", "mamba2", "gated-deltanet", "kda"}
    for arm, mixer in slow.items():
        usual = arms[arm].mixer
        assert usual == type(usual)(**usual.model_dump(exclude={"initial_rates", "initial_bias"}))
        differ = {field for field, value in mixer.model_dump().items() if value != getattr(usual, field)}
        assert differ == {"initial_bias" if arm == "gla" else "initial_rates"}


@pytest.mark.parametrize(("name", "within"), [("attention", 0.01), ("recall", 0.02)])
def test_models_have_equal_parameters(name, within):
    counts = {}
    for arm, model in models(name).items():
        with torch.device("meta"):
            counts[arm] = sum(parameter.numel() for parameter in model.build().parameters())
    assert counts["softmax"] * (1 - within) < min(counts.values())
    assert max(counts.values()) < (1 + within) * counts["softmax"]


OTHER_CACHES = {"softmax": "keys and values of every token", "mla": "latents of every token"}
"""Arms whose cache is no state of H x H numbers per head. A mixer of another kind gets a row, with what it caches."""


@pytest.mark.parametrize("name", ["recall", "attention"])
def test_states_have_equal_sizes(name):
    """Numbers of 0 bytes leave the states of sums alone, without keys and values or the tokens of short convolutions.

    A window's are its keys and values, without the places of its tokens.
    """
    arms = {arm: model for arm, model in models(name).items() if arm not in OTHER_CACHES and "+" not in arm}
    window = arms.pop("sliding")
    square = 4 * window.num_heads * window.head_width**2
    sizes = [
        (arm, model.layer_mixer(index).cache_bytes(model.mixer_shape(index), 10**4, 0))
        for arm, model in arms.items()
        for index in range(model.num_layers)
    ]
    # sums beside a kernel's state
    assert all(square <= size < (1 + 1.1 / window.head_width) * square for _, size in sizes), sizes
    keys_and_values = window.cache_bytes(10**4, 4) - window.cache_bytes(10**4, 0)
    assert 0.9 * square < keys_and_values / window.num_layers <= square
