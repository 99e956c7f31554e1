"""What a config, or a record, means that does not say: every default of each, and what a component declares of itself.

A run is named by what its config says, and two studies are alike if their configs are: a default that changes does so in sight,
in defaults.json and in CHANGELOG.md. `python -m tests.config.test_defaults` writes the file anew.
"""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import llmeff
from llmeff.core.config import Config
from llmeff.record.schema import Record

KEPT = Path(__file__).with_name("defaults.json")


def below(kind):
    return {kind}.union(*map(below, kind.__subclasses__()))


def modules():
    """Of the package, but for its script."""
    found = (module.name for module in pkgutil.walk_packages(llmeff.__path__, "llmeff."))
    return [importlib.import_module(name) for name in found if name != "llmeff.train"]


def configs():
    """Those of the package by name, and the records that it writes; a generic one without its arguments."""
    modules()
    return {
        f"{kind.__module__}.{kind.__qualname__}": kind
        for kind in below(Config) | below(Record)
        if kind.__module__.startswith("llmeff.") and not kind.__pydantic_generic_metadata__["args"]
    }


def declared(kind):
    """The defaults of all fields, and the class attributes that are data."""
    fields = {name: field.default for name, field in kind.model_fields.items() if not field.is_required()}
    own = {name: getattr(kind, name) for base in kind.__mro__ for name in vars(base) if name in kind.__class_vars__}
    data = {
        name: value for name, value in own.items() if isinstance(value, str | int | float | dict | tuple | frozenset)
    }
    found = {}
    for name, value in {**fields, **data}.items():
        plain = value.model_dump(mode="json") if isinstance(value, Config | Record) else value
        found[name] = sorted(plain) if isinstance(plain, frozenset) else plain
    return json.loads(json.dumps(found, default=str))


FOUND = {name: declared(kind) for name, kind in sorted(configs().items())}


def test_every_config_has_its_row():
    assert list(json.loads(KEPT.read_text())) == list(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_not_said_means_what_it_meant(name):
    assert FOUND[name] == json.loads(KEPT.read_text()).get(name)


if __name__ == "__main__":
    KEPT.write_text(json.dumps(FOUND, indent=1) + "\n")
