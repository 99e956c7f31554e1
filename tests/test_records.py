"""Records hold what was found: they do not change, and are made by name."""

import dataclasses
import inspect

import pytest

from tests.config.test_defaults import modules

GROWS = {
    "llmeff.cost.arrays:Array", "llmeff.cost.arrays:Node", "llmeff.cost.arrays:Weight", "llmeff.cost.tape:Leaf",
    "llmeff.models.pretrained:LlmeffConfig", "llmeff.record.clocks:_Step", "llmeff.lab.sweep:_Running",
}  # fmt: skip
"""What a law's tape, a clock or a sweep fills in as it goes; and Hugging Face's config, of which their library sets fields."""
IN_ORDER = {
    "llmeff.compare.effects:_Judged", "llmeff.compare.ledger:Metric", "llmeff.cost.price:Price", "llmeff.cost.workspace:Room",
    "llmeff.models.pretrained:_LayerCache",
}  # fmt: skip
"""Of three fields at most, so that their order is plain."""

KINDS = {
    f"{module.__name__}:{name}": kind
    for module in modules()
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
}


def test_every_exception_is_there():
    assert set(KINDS) >= GROWS | IN_ORDER
    assert all(len(dataclasses.fields(KINDS[name])) <= 3 for name in IN_ORDER)


@pytest.mark.parametrize("name", sorted(set(KINDS) - GROWS))
def test_a_record_does_not_change(name):
    held = object.__new__(KINDS[name])
    for field in dataclasses.fields(held):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(held, field.name, None)


@pytest.mark.parametrize("name", sorted(set(KINDS) - GROWS - IN_ORDER))
def test_a_record_is_made_by_name(name):
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        KINDS[name](None)
