"""Recall through the loop: a delta rule learns it, answers are counted, any split of a batch is the same step."""

import math

import pytest
import torch

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.dist import World
from llmeff.core.seed import derive
from llmeff.record.reader import read_run
from llmeff.run.loop import train

SMALL = {
    "task": "recall",
    "model": {"name": "decoder", "width": 32, "num_layers": 2, "num_heads": 2},
    "data": {"name": "recall", "vocab_size": 16, "pairs": 2, "sequence_length": 16, "held_out": 64},
    "schedule": {"name": "cosine", "warmup_steps": 20},
    "optim": {"name": "adamw", "lr": 1e-2},
    "train": {"steps": 120, "batch": 64},
    "evaluation": {"every": 0, "sample_tokens": 8, "max_units": None},
    "checkpoint": {"every": 0},
    "runtime": {"device": "cpu", "threads": 1},
}


def config(*settings):
    return validate(RunConfig, override(SMALL, settings))


def test_one_layer_with_a_delta_rule_learns_to_recall(tmp_path):
    own = config("model.mixer=deltanet", "model.num_layers=1", "data.noise=false")
    result = train(own, tmp_path / "run")
    assert result.metrics["validation"]["accuracy"] > 0.99
    assert result.metrics["validation"]["loss"] < 0.1
    assert result.error["executed_flops"] == result.error["saved_bytes"] == 0
    assert read_run(tmp_path / "run").steps["loss"][0] == pytest.approx(torch.log(torch.tensor(16.0)).item(), rel=0.2)


def opened(*settings):
    own = config(*settings)
    return own.task.open(own.data, 0, own.train.batch, is_main=True, wait=lambda: None)


def test_a_batch_in_parts_is_the_batch():
    task = opened()
    whole = task.batch(4, range(8), torch.device("cpu"))
    parts = [task.batch(4, rows, torch.device("cpu")) for rows in (range(3), range(3, 8))]
    assert torch.equal(torch.cat([part.inputs["tokens"] for part in parts]), whole.inputs["tokens"])
    assert sum(part.counts["loss"] for part in parts) == whole.counts["loss"] == 16


class Parrot(torch.nn.Module):
    """Answers with the token that follows the last time it saw the asked one; of some pairs it says that it is token 0.

    Args:
        forgets: places of these pairs.
    """

    def __init__(self, *forgets):
        super().__init__()
        self.forgets = forgets

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 16)
        for row, place in torch.cartesian_prod(torch.arange(tokens.shape[0]), torch.arange(tokens.shape[1])).tolist():
            seen = (tokens[row, : min(place, 4)] == tokens[row, place]).nonzero()
            if len(seen):
                forgets = int(seen[0]) // 2 in self.forgets
                logits[row, place, 0 if forgets else tokens[row, seen[0] + 1]] = 50.0
        return logits


ONE = World(rank=0, ranks=1, local_rank=0)


@pytest.mark.parametrize(("forgets", "accuracy", "loss"), [((), 1.0, 0.0), ((1,), 0.5, 25.0), ((0, 1), 0.0, 50.0)])
def test_right_answers_are_counted(forgets, accuracy, loss):
    task = opened()
    results = list(task.evaluate(Parrot(*forgets), "test", 10, torch.device("cpu"), ONE))
    assert len(results) == 10
    assert task.summary(results) == {"loss": pytest.approx(loss, abs=1e-6), "accuracy": accuracy}


class OfTheRow(torch.nn.Module):
    """Gives token 0 a logit of what stands in the row's first place, and all others none."""

    def __init__(self):
        super().__init__()
        self.given, self.weight = [], torch.nn.Parameter(torch.ones(()))

    def forward(self, tokens, targets=None):
        self.given.append(len(tokens))
        logits = torch.zeros(*tokens.shape, 16)
        logits[..., 0] = tokens[:, :1] * self.weight
        assert logits.requires_grad == self.training
        return logits


def test_each_row_has_the_loss_of_its_own_answers():
    """Token 0 is no value: an answer costs the logarithm of e to the row's first token and fifteen more."""
    task, model = opened(), OfTheRow().eval()
    firsts = task._data.held_out_rows("search", range(11)).tokens[:, 0].tolist()
    assert len(set(firsts)) > 2
    rows = list(task.evaluate(model, "search", 11, torch.device("cpu"), ONE))
    assert [row.unit for row in rows] == [f"search/{number}" for number in range(11)]
    assert [row.loss_sum for row in rows] == pytest.approx(
        [2 * math.log(math.exp(first) + 15) for first in firsts], rel=1e-6
    )
    assert task.sample(model, "search", 0, torch.device("cpu")).text.count("0 (not ") == 4 * 2


def test_all_held_out_rows_are_asked_for_unless_there_are_to_be_fewer():
    """The first row tells how wide logits are: of sixteen tokens that count as 256 each, four million are 1024 rows."""
    task, model = opened("data.held_out=1030"), OfTheRow().eval()
    rows = list(task.evaluate(model, "test", None, torch.device("cpu"), ONE))
    assert model.given == [1, 1024, 5]
    for most, number in ((3, 3), (2000, 1030)):
        assert list(task.evaluate(model, "test", most, torch.device("cpu"), ONE)) == rows[:number]


def test_a_batch_goes_to_the_device_without_a_wait_for_what_runs_there(monkeypatch):
    task, copied, copy = opened(), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *to, **how: copied.append(how) or copy(own, *to, **how))
    task.batch(0, range(2), torch.device("cpu"))
    assert copied == [{"non_blocking": True}] * 2


def test_a_step_is_a_mean_over_its_answers_and_counts_its_tokens():
    task = opened()
    assert task.items_per_step == 64 * 16
    batch = task.batch(0, range(3), torch.device("cpu"))
    assert (batch.items, batch.counts) == (3 * 16, {"loss": 3 * 2})
    given = task._data.train_rows(
        derive(0, "data"), 0, range(3)
    )  # of the run's seed, whatever the version that began it
    assert batch.inputs["tokens"].tolist() == given.tokens.tolist()
    assert batch.inputs["targets"].tolist() == given.targets.tolist()
    task.check_split("search")
    facts = task.facts()
    assert (facts["name"], facts["sha256"]) == ("mqar", task._data.fingerprint())


@pytest.mark.parametrize(("given", "found"), [("auto", 16), (16, 16), (17, 17), (1000, 1000)])
def test_a_vocabulary_may_be_larger_than_the_datas(given, found):
    own, task = config(), opened()
    model = own.model.model_copy(update={"vocab_size": given})
    assert own.task.infer_model(model, own.data).vocab_size == task.resolve(model).vocab_size == found


def test_answers_are_shown_beside_the_right_ones_where_they_differ():
    task = opened()
    lines = task.sample(Parrot(1), "test", 0, torch.device("cpu")).text.splitlines()
    given = task._data.held_out_rows("test", range(len(lines)))
    assert len(lines) == 4
    for line, tokens, targets in zip(lines, given.tokens.tolist(), given.targets.tolist(), strict=True):
        answers = []
        for token, target in zip(tokens, targets, strict=True):
            if target >= 0:
                answers.append(f"{token}: 0 (not {target})" if token == tokens[2] else f"{token}: {target}")
        assert line == ", ".join(answers)


def test_what_a_step_and_a_row_are_called():
    task = opened()
    assert task.unit_ids(3, range(1, 3)) == ["step 3, row 1", "step 3, row 2"]
    rows = list(task.evaluate(Parrot(), "test", 2, torch.device("cpu"), ONE))
    assert [(row.unit, row.count, row.metrics) for row in rows] == [
        ("test/0", 2, {"right": 2.0}), ("test/1", 2, {"right": 2.0})
    ]  # fmt: skip
    assert (task.item, task.references("test"), task.facts()["vocab_size"]) == ("token", {}, 16)


@pytest.mark.parametrize("num_rows", [1, 9, 10])
def test_ranks_share_the_rows(num_rows, monkeypatch):
    """After the first four at a time; a rank may be left without any."""
    monkeypatch.setattr("llmeff.tasks.recall._EVAL_LOGITS", 4 * 16 * 256)
    task, shares = opened(), []
    monkeypatch.setattr("llmeff.tasks.recall.group.total", lambda found: shares.append(found) or found)
    for rank in range(2):
        list(
            task.evaluate(Parrot(1), "test", num_rows, torch.device("cpu"), World(rank=rank, ranks=2, local_rank=rank))
        )
    together = sum(shares[:2])
    list(task.evaluate(Parrot(1), "test", num_rows, torch.device("cpu"), ONE))
    assert torch.equal(together, shares[2])
    assert not (shares[0].any(dim=1) & shares[1].any(dim=1)).any()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data=text", "task 'recall' needs questions, but data 'text' provides none: use data 'recall'"),
        ("task=causal_lm", "task 'causal_lm' needs text, but data 'recall' provides none"),
        ("model.vocab_size=8", "model.vocab_size is 8, but data.vocab_size is 16"),
    ],
)
def test_what_does_not_belong_together_is_said(setting, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        train(config(setting), tmp_path / "run")
    assert not (tmp_path / "run").exists()
