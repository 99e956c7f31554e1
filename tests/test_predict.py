"""The price gate: what is predicted is what a step takes, over random models and steps."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmeff.core.config import ConfigError
from llmeff.cost.workload import Workload
from llmeff.models import DecoderConfig
from llmeff.optim import AdamW
from llmeff.predict import fit_micro_batch, predict, price_step, resolve_micro_batch, show, trace
from llmeff.runconfig import RunConfig

_PATH = Path(__file__).parents[1] / "analysis" / "price_gate.py"
_SPEC = importlib.util.spec_from_file_location("price_gate", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
gate = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gate)

PEAK_TOLERANCE = 0.03
MODEL = DecoderConfig(vocab_size=60, width=32, num_layers=2, num_heads=2)


def assert_exact_but_for_the_peak(case):
    predicted, measured = gate.predict(case), gate.measure(case)
    for kind in ("parameters", "optimizer_bytes", "executed_flops", "logits_bytes"):
        assert predicted.total(kind) == measured.total(kind), kind
    assert predicted.parts("saved_bytes") == measured.parts("saved_bytes")
    assert predicted.total("peak_bytes") == pytest.approx(measured.total("peak_bytes"), rel=PEAK_TOLERANCE)


@pytest.mark.parametrize("seed", range(gate.NUM_CASES))
def test_price_gate(seed):
    assert_exact_but_for_the_peak(gate.random_case(seed))


@pytest.mark.parametrize("seed", range(4))
def test_price_gate_of_plain_products(seed):
    assert_exact_but_for_the_peak(gate.random_case(seed, kernel="math"))


@pytest.mark.parametrize("seed", range(3))
def test_price_gate_under_autocast(seed):
    assert_exact_but_for_the_peak(gate.random_case(seed, precision_name="bf16"))


@pytest.mark.parametrize("seed", range(6))
def test_the_law_names_the_models_parameters(seed):
    config = gate.random_case(seed).model
    built = {name: tuple(parameter.shape) for name, parameter in config.build().named_parameters()}
    assert {weight.name: weight.shape for weight in config.weights()} == built


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"recompute": True, "loss_chunk": 40},
        {"packed": True, "num_micro_batches": 3},
        {"precision_name": "bf16"},
    ],
)
def test_a_trace_counts_what_the_law_says(change):
    work = replace(Workload(num_sequences=3, num_tokens=24), **change)
    with torch.device("meta"):
        module = MODEL.build()
    traced, law = trace(module, AdamW(), work), price_step(MODEL, AdamW(), work)
    assert (traced.source, law.source) == ("traced", "law")
    for kind in ("parameters", "optimizer_bytes", "gradient_bytes", "model_flops", "executed_flops", "saved_bytes"):
        assert traced.total(kind) == law.total(kind), kind
    assert traced.total("peak_bytes") == pytest.approx(law.total("peak_bytes"), rel=PEAK_TOLERANCE)


def test_a_transformers_model_is_traced(tmp_path):
    from transformers import GPT2Config

    from llmeff.models.hf import HFModelConfig

    GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=32).save_pretrained(tmp_path)
    model = HFModelConfig(path=str(tmp_path), from_scratch=True, vocab_size=60)
    price = price_step(model, AdamW(), Workload(num_sequences=2, num_tokens=16))
    assert price.source == "traced"
    assert price.total("parameters") == sum(parameter.numel() for parameter in model.build().parameters())
    assert price.total("peak_bytes") > 4 * price.total("parameter_bytes")


def run_config(**train):
    return RunConfig.model_validate(
        {"model": MODEL, "data": {"name": "text", "sequence_length": 32}, "train": {"batch": 12, **train}}
    )


def test_micro_batches_are_accumulated():
    whole, split = predict(run_config(micro_batch=12)), predict(run_config(micro_batch=3))
    assert split.total("executed_flops") == whole.total("executed_flops")
    assert split.total("saved_bytes") < whole.total("saved_bytes") / 3
    assert split.total("peak_bytes") < whole.total("peak_bytes")


@pytest.mark.parametrize("fitting", [1, 3, 6, 12])
def test_the_largest_micro_batch_that_fits_is_taken(fitting):
    budget_bytes = predict(run_config(micro_batch=fitting)).total("peak_bytes")
    assert fit_micro_batch(run_config(), budget_bytes) == fitting


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"one sequence at a time would take .* and 1000 B may be used"):
        fit_micro_batch(run_config(), 1000)


def test_micro_batch_is_resolved():
    assert resolve_micro_batch(run_config(micro_batch=4)) == 4
    assert resolve_micro_batch(run_config()) == 12


def test_an_unresolved_vocabulary_is_an_error():
    with pytest.raises(ConfigError, match="vocab_size is auto"):
        predict(RunConfig())


def test_the_price_is_shown():
    shown = show(predict(run_config()))
    assert "parameters" in shown
    assert "MiB" in shown
    assert "traced" not in shown
