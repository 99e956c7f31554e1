"""`check_mixer` passes a mixer that is no part of the package, and says of a broken one what differs."""

import pytest
import torch

from llmeff.core.layout import Layout
from llmeff.testing import CheckFailed, check_mixer


def test_one_that_is_right_passes(outside):
    own = outside("sigmoid")
    check_mixer(own.Sigmoid(), own.formula)


def test_values_that_are_not_the_formulas_are_named(outside):
    own = outside("sigmoid")
    said = r"mixer 'outside-sigmoid': output, compared with the formula: differs by .* of the largest expected number, "
    said += "but at most 1e-09 is allowed"
    with pytest.raises(CheckFailed, match=said):
        check_mixer(own.Sigmoid(), lambda mixer, x: 1.001 * own.formula(mixer, x))


def looks_ahead(forward, mixer, x, layout, cache=None):
    return forward(mixer, torch.cat((x[:, 1:], x[:, :1]), dim=1), layout, cache)


def forgets(forward, mixer, x, layout, cache=None):
    return forward(mixer, x, layout)


def mingles(forward, mixer, x, layout, cache=None):
    return forward(mixer, x, Layout(positions=layout.positions, padding=layout.padding, past=layout.past), cache)


def sees_padding(forward, mixer, x, layout, cache=None):
    return forward(mixer, x, Layout(positions=layout.positions, documents=layout.documents, past=layout.past), cache)


def widens(forward, mixer, x, layout, cache=None):
    out = forward(mixer, x, layout, cache)
    return out.float() if out.dtype == torch.bfloat16 else out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (looks_ahead, r"mixer 'outside-sigmoid': token 9 depends on the later tokens \[10\]"),
        (forgets, r"mixer 'outside-sigmoid' with a cache, in pieces of \(1, 1, .*\) tokens: differs by"),
        (mingles, r"mixer 'outside-sigmoid': output for packed documents: differs by"),
        (sees_padding, r"mixer 'outside-sigmoid' without a cache: output for the row with padding: differs by"),
        (widens, r"mixer 'outside-sigmoid' in bfloat16 returns torch.float32, not torch.bfloat16"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_a_broken_form_is_named(outside, monkeypatch, change, said):
    own = outside("sigmoid")
    forward = own.SigmoidMixer.forward
    monkeypatch.setattr(own.SigmoidMixer, "forward", lambda *given: change(forward, *given))
    with pytest.raises(CheckFailed, match=said):
        check_mixer(own.Sigmoid())


def test_wrong_bytes_of_a_cache_are_named(outside, monkeypatch):
    own = outside("sigmoid")
    monkeypatch.setattr(own.Sigmoid, "cache_bytes", lambda *given: 1000)
    with pytest.raises(
        CheckFailed, match=r"in fp32: the cache of two rows of 9 tokens has 1344 bytes, but cache_bytes states 2000"
    ):
        check_mixer(own.Sigmoid())


def test_a_wrong_law_is_named(outside, monkeypatch):
    own = outside("sigmoid")

    def of_what_is_given(self, shape, tape, query, key, batch):
        query, key = (own.laws.function(tape, own.laws.cast(tape, x, "float32"), "input") for x in (query, key))
        return query, key, None

    monkeypatch.setattr(own.Sigmoid, "features_law", of_what_is_given)
    with pytest.raises(CheckFailed, match=r"in a step \(.*\): saved_bytes is \d+, but its law states \d+"):
        check_mixer(own.Sigmoid())


def test_widths_that_it_does_not_take_are_named(outside, monkeypatch):
    own = outside("sigmoid")
    monkeypatch.setattr(own.Sigmoid, "problems", lambda self, shape: ["it wants width 8"])
    with pytest.raises(CheckFailed, match=r"does not support MixerShape\(width=12.*: it wants width 8"):
        check_mixer(own.Sigmoid())
