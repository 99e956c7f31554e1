"""What a task owes the loop, and what a step of each is for the laws."""

import dataclasses
import inspect

import pytest

from llmeff.core.config import validate
from llmeff.core.metric import Direction
from llmeff.data import ImageData, TextData
from llmeff.data.recall import RecallData
from llmeff.models import DecoderConfig, ImageModelConfig, LanguageModelConfig, SegNetBasic
from llmeff.tasks import TaskConfig
from llmeff.tasks.task import ITEMS, Batch, Sample, Task, UnitResult

METHODS = [name for name, value in vars(Task).items() if inspect.isfunction(value)]
"""What the loop asks of a task."""


def test_a_task_has_what_the_loop_asks_for():
    assert METHODS == [
        "resolve", "parameter_infos", "batch", "loss", "unit_ids", "evaluate", "summary", "check_split", "references", "sample",
        "save_model", "facts",
    ]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_task_without_one_of_its_methods_is_none(name):
    methods = {method: lambda *given: None for method in METHODS}
    type("Whole", (Task,), methods)()
    del methods[name]
    with pytest.raises(TypeError, match=rf"abstract method '?{name}\b"):
        type("Lacking", (Task,), methods)()


@pytest.mark.parametrize(
    "made",
    [
        Batch(inputs={}, counts={"loss": 2.5}, items=3),
        UnitResult(unit="it", loss_sum=1.0, count=2, metrics={}),
        Sample(text="it"),
    ],
    ids=lambda made: type(made).__name__,
)
def test_what_a_task_gives_is_named_and_stays_as_it_is(made):
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    assert type(made)(**values) == made
    with pytest.raises(TypeError):
        type(made)(*values.values())
    for name, value in values.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, value)


def test_items_are_added_up_beside_what_losses_are_divided_by():
    assert Batch(inputs={}, counts={"loss": 2.5, "other": 4}, items=3).totals() == {"loss": 2.5, "other": 4, ITEMS: 3}


def test_a_task_shows_text_or_a_picture_or_nothing():
    assert (Sample().text, Sample().picture) == (None, None)
    assert Batch(inputs={}, counts={}, items=0).targets is None


@pytest.mark.parametrize(
    ("method", "given"),
    [("items", (None,)), ("workload", (None, None)), ("open", (None, 0, 1))],
)
def test_a_tasks_config_says_it_all_itself(method, given):
    named = {"is_main": True, "wait": lambda: None} if method == "open" else {}
    bare = TaskConfig.model_construct(name="bare")
    with pytest.raises(NotImplementedError, match="TaskConfig"):
        getattr(bare, method)(*given, **named)
    assert bare.infer_model(None, None) is None


# -- each task

FITTING = {
    "causal_lm": (DecoderConfig(vocab_size=300), {"sequence_length": 40}),
    "recall": (DecoderConfig(), {"name": "recall", "sequence_length": 40}),
    "segmentation": (SegNetBasic(), {"name": "images", "augment": {"crop": [32, 40]}}),
}
"""A model and data for each."""


def parts(name):
    model, data = FITTING[name]
    kind = {"causal_lm": TextData, "recall": RecallData, "segmentation": ImageData}[name]
    return TaskConfig.registry[name](), model, validate(kind, data)


def test_every_task_is_in_the_table():
    assert set(FITTING) == set(TaskConfig.registry.names())


@pytest.mark.parametrize("name", FITTING)
def test_a_steps_work_is_told_of_one_row(name):
    """What more there is of it, micro-batches and rows, is the run's to say."""
    task, model, data = parts(name)
    work = task.workload(model, data)
    assert work.num_tokens == task.items(data) == (32 * 40 if name == "segmentation" else 40)
    assert (work.num_sequences, work.num_micro_batches) == (1, 1)
    assert work.image_size == ((32, 40) if name == "segmentation" else None)


@pytest.mark.parametrize("name", FITTING)
def test_what_does_not_fit_is_named_once_each(name):
    task, model, data = parts(name)
    assert list(task.problems(model, data)) == []
    other = "recall" if name == "segmentation" else "segmentation"
    _, other_model, other_data = parts(other)
    first, second = task.problems(other_model, other_data)
    assert repr(other_model.name) in first
    assert repr(other_data.name) in second
    assert list(task.problems(other_model, data)) == [first]
    assert list(task.problems(model, other_data)) == [second]


def test_the_kinds_are_those_that_the_base_class_states():
    kinds = {name: (task.model_kind, task.data_kind) for name in FITTING for task in [TaskConfig.registry[name]]}
    assert kinds == {
        "causal_lm": (LanguageModelConfig, TextData),
        "recall": (LanguageModelConfig, RecallData),
        "segmentation": (ImageModelConfig, ImageData),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "causal_lm",
            [
                "task 'causal_lm' needs a language model, but model 'segnet-basic' is not one",
                "task 'causal_lm' needs text, but data 'images' provides none",
            ],
        ),
        (
            "recall",
            [
                "task 'recall' needs a language model, but model 'segnet-basic' is not one",
                "task 'recall' needs questions, but data 'images' provides none: use data 'recall'",
            ],
        ),
        (
            "segmentation",
            [
                "task 'segmentation' needs an image model, but model 'decoder' is not one",
                "task 'segmentation' needs images, but data 'recall' provides none",
            ],
        ),
    ],
)
def test_the_error_says_what_is_needed(name, expected):
    _, model, data = parts("recall" if name == "segmentation" else "segmentation")
    assert list(TaskConfig.registry[name]().problems(model, data)) == expected


@pytest.mark.parametrize("name", FITTING)
def test_a_task_that_states_no_kinds_takes_every_model_and_data(name):
    _, model, data = parts(name)
    assert list(TaskConfig.model_construct(name="bare").problems(model, data)) == []


@pytest.mark.parametrize("name", FITTING)
def test_every_goal_has_a_way_that_is_better(name):
    """A loss is better lower; whatever is a share of what is right, higher."""
    metric_directions = TaskConfig.registry[name].metric_directions
    assert "loss" in metric_directions
    assert set(metric_directions.values()) <= set(Direction.__args__)
    for metric, way in metric_directions.items():
        assert way == ("lower" if metric in ("loss", "bits_per_byte") else "higher"), metric
