"""Which mixer each layer has: patterns, and what of them cannot be."""

import pytest

from llmeff.core.config import ConfigError, validate
from llmeff.models.transformer import DecoderConfig


def config(**fields):
    return validate(DecoderConfig, {"vocab_size": 61, "width": 32, "num_layers": 6, **fields})


def names(own):
    return [own.layer_mixer(index).name for index in range(own.num_layers)]


def test_a_pattern_goes_on_to_the_last_layer():
    assert names(config(pattern="gated-deltanet*2+softmax")) == ["gated-deltanet", "gated-deltanet", "softmax"] * 2
    assert names(config(pattern=" kda + linear ")) == ["kda", "linear"] * 3


def test_settings_go_by_any_name():
    own = config(pattern="wide*2+mamba2", mixers={"wide": {"name": "mamba2", "state_width": 256}})
    assert [own.layer_mixer(index).state_width for index in range(3)] == [256, 256, 128]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "gated-deltant+softmax"}, "there is no mixer 'gated-deltant'. Did you mean 'gated-deltanet'?"),
        ({"pattern": "wid+softmax", "mixers": {"wide": {"name": "kda"}}}, "Did you mean 'wide'"),
        ({"pattern": "linear*3+softmax"}, "has 4 layers, which does not divide num_layers 6"),
        ({"pattern": "linear*0+softmax"}, "give a positive number after '*' for 'linear'"),
        ({"pattern": "linear*two+softmax"}, "give a positive number after '*' for 'linear'"),
        ({"pattern": "linear+"}, "there is no mixer ''"),
        ({"pattern": "linear", "mixers": {"wide": {"name": "kda"}}}, "mixers.wide: the pattern 'linear' does not name"),
        ({"mixer": "lineer"}, "Did you mean 'linear'"),
        ({"layers": [{"mixer": "slidng"}] + [{}] * 5}, "Did you mean 'sliding'"),
        (
            {"mixer": "kda", "pattern": "linear"},
            "mixer is 'kda', but no layer uses it, because pattern 'linear' names the mixers of all layers",
        ),
        ({"mixers": {"wide": {"name": "kda"}}}, "mixers defines 'wide', but there is no pattern that uses it"),
        ({"pattern": "sliding", "mixers": {"sliding": {"name": "sliding", "window": -3}}}, "(given: -3)"),
    ],
)
def test_what_cannot_be_is_one_clear_error(fields, message):
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1
