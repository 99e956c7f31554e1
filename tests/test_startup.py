"""The measurement of start-up tells what is ours from the imports of other packages."""

import importlib.util
import json
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[1] / "analysis" / "startup.py"
_SPEC = importlib.util.spec_from_file_location("startup", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
startup = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(startup)


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    startup.main(tmp_path / "startup.json", num_processes=1)
    medians = json.loads((tmp_path / "startup.json").read_text())["medians"]
    assert set(medians) == {*startup.RECIPES, "help"}
    for recipe in startup.RECIPES:
        assert medians[recipe].keys() == {"imports", "ours"}
        assert all(clock > 0 for part in medians[recipe].values() for clock in part.values())
