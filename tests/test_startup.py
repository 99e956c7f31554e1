"""The measurement of start-up tells what is ours from the imports of other packages."""

import json

import pytest

from tests.scripts import load_script

startup = load_script("analysis/startup.py")


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    startup.main(tmp_path / "startup.json", num_processes=1)
    medians = json.loads((tmp_path / "startup.json").read_text())["medians"]
    assert set(medians) == {*startup.RECIPES, "help"}
    for recipe in startup.RECIPES:
        assert medians[recipe].keys() == {"imports", "ours"}
        assert all(clock > 0 for part in medians[recipe].values() for clock in part.values())
