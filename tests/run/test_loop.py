"""The loop: any split of a step is the same step, a step that is not finite is not made, the record is complete."""

import dataclasses
import json
import math

import pytest
import torch

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.record import schema
from llmeff.record.devices import DEVICES, Device
from llmeff.record.reader import read_run
from llmeff.run.loop import DivergedError, Trainer, train
from tests.mixers import every_mixer, fields

TINY = {
    "model": {"name": "decoder", "width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 32},
    "data": {
        "name": "text",
        "source": {"name": "builtin", "max_bytes": 300_000},
        "splits": {"by": "span"},
        "sequence_length": 32,
    },
    "schedule": {"name": "constant"},
    "train": {"steps": 6, "batch": 4},
    "evaluation": {"every": 3, "max_units": 2, "sample_tokens": 4},
    "checkpoint": {"every": 2, "keep": 2},
    "runtime": {"device": "cpu", "threads": 1},
}


def tiny(*settings):
    return validate(RunConfig, override(TINY, settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "run"
    return folder, train(tiny(), folder)


def test_the_record_is_complete(finished):
    folder, result = finished
    run = read_run(folder)
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.steps["items"].tolist() == [4 * 32] * 6
    assert run.steps["items_seen"].tolist() == [4 * 32 * step for step in range(1, 7)]
    assert run.result == result
    assert result.status == "finished"
    assert set(run.evals["step"].to_pylist()) == {3, 6}
    assert [(row.step, row.split) for row in run.evaluations] == [(3, "validation"), (6, "validation")]
    assert run.evaluations[-1].metrics == result.metrics["validation"]
    assert result.metric_directions == {"loss": "lower", "bits_per_byte": "lower"}
    assert {path.name for path in folder.iterdir()} >= {
        schema.CONFIG, schema.ENVIRONMENT, schema.METRICS, schema.EVALUATIONS, schema.EVALS, schema.RESULT,
        schema.MODEL, schema.CHECKPOINTS, "loss.png",
    }  # fmt: skip
    assert [path.name for path in sorted((folder / schema.CHECKPOINTS).iterdir())] == ["step-00000004", "step-00000006"]


def test_evaluations_can_be_a_share_of_the_run_apart(tmp_path):
    train(tiny("evaluation.every=0.25", "train.steps=8", "evaluation.sample_tokens=0"), tmp_path / "run")
    assert set(read_run(tmp_path / "run").evals["step"].to_pylist()) == {2, 4, 6, 8}
    for wrong in ("1.0", "1.5", "-0.5", "0.0"):
        with pytest.raises(ConfigError, match=r"evaluation\.every"):
            tiny(f"evaluation.every={wrong}")


def test_predictions_stand_beside_measurements(finished):
    _, result = finished
    assert result.error["parameters"] == 0
    assert result.error["executed_flops"] == 0
    assert abs(result.error["saved_bytes"]) <= 0.05
    assert abs(result.error["peak_bytes"]) <= 0.05


def test_an_impossible_mfu_costs_no_result(tmp_path, monkeypatch, caplog):
    slow = Device(half_flops_per_s=1.0, single_flops_per_s=1.0, memory_bytes_per_s=1.0)
    monkeypatch.setitem(DEVICES, "cpu", slow)
    with caplog.at_level("WARNING", logger="llmeff"):
        result = train(tiny(), tmp_path / "run")
    assert "no MFU is recorded: it would be " in caplog.text
    assert result.mfu is None
    assert result.model_flops_per_s > 1
    assert read_run(tmp_path / "run").result == result


def test_the_saved_config_is_resolved_and_runs_again(finished, tmp_path):
    folder, result = finished
    saved = json.loads((folder / schema.CONFIG).read_text())
    assert "auto" not in json.dumps([saved["train"], saved["runtime"], saved["model"]["vocab_size"]])
    again = train(validate(RunConfig, saved), tmp_path / "again")
    assert again.metrics == result.metrics


def test_the_model_opens_with_plain_transformers_and_scores_the_loss_of_the_run(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, result = finished
    model = AutoModelForCausalLM.from_pretrained(folder / schema.MODEL)
    assert type(model).__name__ == "LlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(folder / schema.MODEL)
    trainer_config = validate(RunConfig, json.loads((folder / schema.CONFIG).read_text()))
    corpus = trainer_config.data.open()
    windows = corpus.eval_windows("validation")
    batch = windows.batch(range(windows.num_windows))
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    assert float(loss) == pytest.approx(result.metrics["validation"]["loss"], rel=1e-6)
    assert tokenizer.decode(tokenizer("def f(x):\n").input_ids) == "def f(x):\n"


@pytest.mark.parametrize("packing", ["plain", "documents"])
def test_any_split_into_micro_batches_gives_the_same_losses(tmp_path, packing):
    rows = {}
    for size in (4, 2, 1):
        config = tiny(f"data.packing={packing}", f"train.micro_batch={size}")
        train(config, tmp_path / str(size))
        rows[size] = read_run(tmp_path / str(size)).steps
    for size in (2, 1):
        for name in ("loss", "grad_norm"):
            assert rows[size][name] == pytest.approx(rows[4][name], rel=1e-5), (size, name)


def test_masked_targets_weigh_nothing_however_they_fall_into_micro_batches(tmp_path, monkeypatch):
    from llmeff.data.packing import MASKED, TrainWindows

    whole = TrainWindows.batch

    def ragged(self, seed, step, rows, global_batch):
        packed = whole(self, seed, step, rows, global_batch)
        targets = packed.targets.copy()
        for place, row in enumerate(rows):  # row 0 counts every target, row 3 only eight
            targets[place, 32 - 8 * row :] = MASKED
        return dataclasses.replace(packed, targets=targets)

    monkeypatch.setattr(TrainWindows, "batch", ragged)
    rows = {}
    for size in (4, 1):
        train(tiny("data.packing=documents", f"train.micro_batch={size}"), tmp_path / str(size))
        rows[size] = read_run(tmp_path / str(size)).steps
    assert rows[4]["items"].tolist() == [32 + 24 + 16 + 8] * 6
    for name in ("loss", "grad_norm"):
        assert rows[1][name] == pytest.approx(rows[4][name], rel=1e-5)


def test_recomputation_and_chunked_loss_change_no_loss(tmp_path, finished):
    plain = read_run(finished[0]).steps["loss"]
    train(tiny("runtime.recompute=true", "task.loss_chunk=7"), tmp_path / "run")
    assert read_run(tmp_path / "run").steps["loss"] == pytest.approx(plain, rel=1e-5)


def test_a_step_that_is_not_finite_is_not_made_and_stops_the_run(tmp_path, monkeypatch):
    config, folder = tiny(), tmp_path / "run"
    with Trainer(config, folder, resume=False, is_silent=True) as trainer:
        for _ in range(4):
            trainer.train_step()
            trainer.save_if_due()
        before = {name: tensor.clone() for name, tensor in trainer._strategy.state_dict().items()}
        loss = trainer._task.loss
        monkeypatch.setattr(trainer._task, "loss", lambda *given: {"loss": loss(*given)["loss"] * math.nan})
        with pytest.raises(DivergedError) as raised:
            trainer.train_step()
        after = trainer._strategy.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    text = str(raised.value)
    assert "step 5: loss nan, gradient norm nan" in text
    assert "the checkpoint of step 4 is kept" in text
    assert ".py" in text  # the documents of the step, by name
    run = read_run(folder)
    assert run.result.status == "diverged"
    assert run.steps["step"].tolist() == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(tmp_path, finished, caplog):
    whole, folder = read_run(finished[0]), tmp_path / "run"
    with Trainer(tiny(), folder, resume=False, is_silent=True) as trainer:
        for _ in range(5):
            trainer.train_step()
            trainer.evaluate_if_due()
            trainer.save_if_due()
    weights = folder / schema.CHECKPOINTS / "step-00000004" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with caplog.at_level("WARNING", logger="llmeff"):
        train(tiny(), folder, resume=True)
    assert "step-00000004 is damaged, so it is skipped: rank-00000.safetensors" in caplog.text
    assert read_run(folder).steps["loss"].tolist() == whole.steps["loss"].tolist()


def test_resuming_with_another_config_names_each_difference(tmp_path):
    folder = tmp_path / "run"
    with Trainer(tiny(), folder, resume=False, is_silent=True) as trainer:
        trainer.train_step()
    with pytest.raises(ConfigError) as raised:
        train(tiny("optim.lr=0.5", "train.steps=7"), folder, resume=True)
    assert f"optim.lr: the run in {folder} has 0.001, but you asked for 0.5" in str(raised.value)
    assert f"train.steps: the run in {folder} has 6, but you asked for 7" in str(raised.value)


def test_the_launchers_world_must_be_the_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"parallel\.ranks is 1 in the config, but the launcher \(WORLD_SIZE\) says 2"
    ):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_launchers_precision_must_be_the_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"precision is 'fp32' in the config, but .* --mixed_precision says 'bf16'"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("compiled", ["layers", "model"])
def test_a_compiled_run_measures_no_bytes_that_it_does_not_see(tmp_path, finished, compiled):
    with torch.compiler.set_stance("force_eager"):  # the compiling itself is none of this
        result = train(tiny(f"runtime.compile={compiled}"), tmp_path / "run")
    assert set(finished[1].measured) - set(result.measured) == {"saved_bytes"}
    assert result.predicted == finished[1].predicted
    assert result.error["executed_flops"] == 0
    assert "saved_bytes" not in result.error


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["layers", "model"])
def test_a_compiled_run_is_the_eager_run_to_rounding_and_stays_compiled(tmp_path, finished, compiled):
    from torch._dynamo.utils import counters

    counters.clear()
    train(tiny(f"runtime.compile={compiled}"), tmp_path / "run")
    eager, run = read_run(finished[0]), read_run(tmp_path / "run")
    assert run.steps["loss"] == pytest.approx(eager.steps["loss"], rel=1e-4)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2 * trainable_layers(compiled)


@pytest.mark.slow
@every_mixer
@pytest.mark.parametrize("recompute", [False, True])
def test_every_mixer_compiles_to_the_same_losses(tmp_path, name, recompute):
    from torch._dynamo.utils import counters

    plain, losses = tiny(f"runtime.recompute={recompute}".lower(), "train.steps=4").model_dump(mode="json"), []
    plain["model"] |= fields(name, num_kv_heads=1)
    for compiled in ("off", "model"):
        counters.clear()
        train(validate(RunConfig, override(plain, [f"runtime.compile={compiled}"])), tmp_path / compiled)
        losses.append(read_run(tmp_path / compiled).steps["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not counters["graph_break"]


def trainable_layers(compiled):
    """Graphs that a run may have: one for each compiled module, with and without gradients."""
    return TINY["model"]["num_layers"] if compiled == "layers" else 1
