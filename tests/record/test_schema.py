import math

import pytest

from llmeff.record.schema import Result, relative_errors


def test_errors_are_of_quantities_that_were_both_predicted_and_measured():
    predicted = {"peak_bytes": 90.0, "parameters": 5.0, "wire_bytes": 0.0, "saved_bytes": 1.0, "foreseen": 1.0}
    measured = {"peak_bytes": 100.0, "parameters": 5.0, "wire_bytes": 0.0, "saved_bytes": 0.0, "seen": 1.0}
    assert relative_errors(predicted, measured) == {
        "peak_bytes": pytest.approx(-0.1), "parameters": 0.0, "wire_bytes": 0.0, "saved_bytes": math.inf,
    }  # fmt: skip


def test_a_result_from_before_there_were_goals_has_none(result):
    older = result.model_dump(exclude={"metric_directions"})
    assert Result.model_validate(older).metric_directions == {}


def test_a_result_with_an_infinite_error_comes_back(result):
    broken = result.model_copy(update={"error": {"saved_bytes": math.inf}, "train_loss": -math.inf})
    assert Result.model_validate_json(broken.model_dump_json()) == broken


def test_a_result_is_read_by_the_names_that_its_fields_had_before(result):
    older = result.model_dump(exclude={"metric_directions"}) | {"goals": {"loss": "lower"}}
    assert Result.model_validate(older) == result.model_copy(update={"metric_directions": {"loss": "lower"}})
