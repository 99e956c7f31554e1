import json
import subprocess
import sys

import pytest

from llmeff.cost.price import Price

ONE = Price({("parameters", "mlp"): 6, ("parameters", "norms"): 2, ("model_flops", "mlp"): 5})


def test_prices_add_up():
    assert ONE + ONE == 2 * ONE
    assert (ONE + Price({("parameters", "head"): 1})).total("parameters") == 9
    assert (3 * ONE).parts("parameters") == {"mlp": 18, "norms": 6}
    assert ONE.total("wire_bytes") == 0


def test_nothing_costs_nothing():
    assert Price({("parameters", "mlp"): 0}) == Price()


def test_what_holds_a_trace_is_traced():
    assert (ONE + Price(source="traced")).source == "traced"
    assert (ONE + ONE).source == "law"


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"unknown kinds of cost: parameter. Allowed: parameters"):
        Price({("parameter", "mlp"): 1})


def test_round_trip_through_json():
    data = json.loads(json.dumps(ONE.as_dict()))
    assert data["parameters"]["total"] == 8
    assert Price.from_dict(data) == ONE


def test_cost_imports_no_torch():
    code = "import sys, llmeff.cost.step, llmeff.record.devices; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
