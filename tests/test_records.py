"""Records hold what was found: they do not change, and those of many fields are made by name."""

import dataclasses
import importlib
from pathlib import Path

import pytest

BY_NAME = [
    "compare.effects:Effect",
    "compare.effects:Effects",
    "compare.intervals:Difference",
    "compare.intervals:Estimate",
    "compare.intervals:_Spreads",
    "compare.ledger:Entry",
    "compare.plots:Curves",
    "compare.table:RunSummary",
    "compare.text_table:TextTable",
    "compare.verdict:Calibration",
    "compare.verdict:Cell",
    "compare.verdict:Comparison",
    "compare.verdict:Group",
    "compare.verdict:Noise",
    "compare.verdict:Quantity",
    "compare.verdict:Tuning",
    "cost.devices:Device",
    "cost.workload:Workload",
    "cost.workspace:Convolution",
]
IN_ORDER = ["compare.effects:_Judged", "compare.ledger:Metric", "cost.price:Price", "cost.workspace:Room"]


def record(name):
    module, _, own = name.partition(":")
    return getattr(importlib.import_module(f"llmeff.{module}"), own)


@pytest.mark.parametrize("name", [*BY_NAME, *IN_ORDER])
def test_a_record_does_not_change(name):
    kind = record(name)
    made = object.__new__(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, None)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_record_of_many_fields_is_made_by_name(name):
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        record(name)(None)


@pytest.mark.parametrize("package", ["compare", "cost"])
def test_all_records_are_named_here(package):
    folder = importlib.import_module(f"llmeff.{package}").__path__[0]
    found = set()
    for path in Path(folder).glob("*.py"):
        module = importlib.import_module(f"llmeff.{package}.{path.stem}")
        found |= {
            f"{package}.{path.stem}:{name}" for name, own in vars(module).items()
            if dataclasses.is_dataclass(own) and isinstance(own, type) and own.__module__ == module.__name__
        }  # fmt: skip
    growing = {"cost.arrays:Array", "cost.arrays:Node", "cost.arrays:Weight", "cost.tape:Leaf"}
    assert found - growing == {name for name in [*BY_NAME, *IN_ORDER] if name.startswith(package)}
