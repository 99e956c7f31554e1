"""What needs a CUDA device: every precision trains there, and a deterministic run repeats and resumes to the last bit."""

from typing import get_args

import pytest
import torch

from llmeff.attention import MixerConfig, fla
from llmeff.config.run import RunConfig
from llmeff.core.config import override, validate
from llmeff.record.reader import read_run
from llmeff.run.loop import Trainer, train
from tests.run.test_loop import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MIXERS = {name: MixerConfig.registry[name] for name in MixerConfig.registry.names()}


def kernels_of(kind):
    """What the field `kernel` takes; nothing where there is none."""
    field = kind.model_fields.get("kernel")
    return () if field is None else get_args(field.annotation)


def on_gpu(*settings):
    config = override(TINY, ["runtime.device=cuda", "train.steps=12", "checkpoint.every=4", *settings])
    return validate(RunConfig, config)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_in_every_precision_and_meets_its_price(tmp_path, precision):
    result = train(on_gpu(f"precision={precision}"), tmp_path / "run")
    assert result.status == "finished"
    assert result.error["parameters"] == 0
    assert result.energy_j is None or result.energy_j > 0
    steps = read_run(tmp_path / "run").steps
    assert steps["loss"][-1] < steps["loss"][0]
    assert (steps["peak_allocated_bytes"] > 0).all()
    assert (steps["step_s"] > 0).all()


def test_a_deterministic_run_repeats_and_resumes_to_the_last_bit(tmp_path):
    config = on_gpu("runtime.deterministic=true")
    train(config, tmp_path / "whole")
    with Trainer(config, tmp_path / "cut", resume=False, is_silent=True) as trainer:
        for _ in range(6):
            trainer.train_step()
            trainer.evaluate_if_due()
            trainer.save_if_due()
    train(config, tmp_path / "cut", resume=True)
    whole, cut = read_run(tmp_path / "whole"), read_run(tmp_path / "cut")
    for name in ("loss", "grad_norm"):
        assert whole.steps[name].tolist() == cut.steps[name].tolist()
    assert whole.result.metrics == cut.result.metrics


@pytest.mark.skipif(not fla.is_installed(), reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("packing", ["plain", "documents"])
@pytest.mark.parametrize("name", [name for name, kind in MIXERS.items() if getattr(kind, "fuses", ())])
def test_a_run_with_kernels_of_flash_linear_attention_is_the_run_without(tmp_path, name, packing):
    given = ["precision=bf16", f"data.packing={packing}", f"model.mixer={name}", "model.head_dim=16"]
    found = {}
    for kernel in ("torch", "auto"):
        result = train(on_gpu(*given, f"model.mixer.kernel={kernel}"), tmp_path / kernel)
        found[kernel] = read_run(tmp_path / kernel).steps["loss"].tolist()
        scans = {ran for ran in result.kernels if ran.startswith("scan: ")}
        is_refused = fla.is_flawed() and MIXERS[name].gates_heads
        assert scans == {"scan: torch" if kernel == "torch" or is_refused else "scan: flash-linear-attention"}
    assert found["auto"] == pytest.approx(found["torch"], rel=2e-2)


@pytest.mark.parametrize("name", [name for name, kind in MIXERS.items() if "flex" in kernels_of(kind)])
def test_a_run_with_flex_attention_is_the_run_without(tmp_path, name):
    given = ["data.packing=documents", f"model.mixer={name}", "model.head_dim=16"]
    given += ["model.mixer.window=5"] if "window" in MIXERS[name].model_fields else []
    found = {}
    for kernel in ("sdpa", "flex"):
        result = train(on_gpu(*given, f"model.mixer.kernel={kernel}"), tmp_path / kernel)
        found[kernel] = read_run(tmp_path / kernel).steps["loss"].tolist()
        assert ("attention: torch FlexAttention, counted as sdpa" in result.kernels) == (kernel == "flex")
    assert found["flex"] == pytest.approx(found["sdpa"], rel=1e-3)


WORKSPACE = 64 * 2**20
"""What libraries keep beside what is priced: on a Hopper GPU cuBLAS alone 32 MiB."""
IMAGES = {
    "task": {"name": "segmentation", "balance": 0.5},
    "model": {"name": "segnet", "width": 8, "connection": "add"},
    "data": {
        "name": "images",
        "source": {
            "name": "scenes", "height": 45, "width": 60, "num_train": 16, "num_search": 0, "num_validation": 4,
            "num_test": 0,
        },
        "augment": {"flip": 0.5},
    },
    "schedule": {"name": "constant"},
    "train": {"steps": 10, "batch": 4},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 0},
    "runtime": {"device": "cuda", "threads": 1},
}  # fmt: skip


def images(*settings):
    return validate(RunConfig, override(IMAGES, settings))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_segnet_trains_as_on_the_cpu_and_keeps_what_is_priced(tmp_path, precision):
    result = train(images(f"precision={precision}"), tmp_path / "run")
    assert result.error["parameters"] == 0
    weights_of_classes = 4 * 11  # which no law has
    assert result.measured["saved_bytes"] - result.predicted["saved_bytes"] == weights_of_classes
    losses = read_run(tmp_path / "run").steps["loss"]
    if precision == "fp32":  # convolutions may add in TF32, of 10 bits
        train(images("runtime.device=cpu"), tmp_path / "cpu")
        assert losses == pytest.approx(read_run(tmp_path / "cpu").steps["loss"], rel=2**-9)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_segnet_meets_its_price(tmp_path, precision):
    """Pictures so large that a workspace is little beside what is kept of them."""
    large = ("model.width=32", "data.source.height=360", "data.source.width=480", "train.steps=4", "train.batch=8")
    result = train(images(f"precision={precision}", *large), tmp_path / "run")
    predicted, measured = (kinds["peak_bytes"] for kinds in (result.predicted, result.measured))
    assert predicted > 20 * WORKSPACE
    assert abs(measured - predicted) <= 0.05 * predicted + WORKSPACE


def test_a_deterministic_segnet_repeats_to_the_last_bit(tmp_path):
    for name in ("a", "b"):
        train(images("runtime.deterministic=true"), tmp_path / name)
    a, b = (read_run(tmp_path / name).steps["loss"] for name in ("a", "b"))
    assert a.tolist() == b.tolist()


ZERO = {
    "zero 0": ("parallel.stage=0",),
    "zero 1": ("parallel.stage=1",),
    "zero 2": ("parallel.stage=2",),
    "zero 3": ("parallel.stage=3",),
    "zero 2, offload": ("parallel.stage=2", "parallel.offload_optimizer=true"),
    "zero 3, offload": ("parallel.stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true"),
}


@pytest.mark.parametrize("stage", ZERO)
def test_every_stage_on_one_device_is_the_run_without_it(tmp_path, stage):
    """Ten steps of fp32: another kernel adds in another order, so losses agree to 1e-5, on the CPU too to 1e-4."""
    short = ("train.steps=10", "schedule=constant", "optim.lr=3e-4")
    train(on_gpu(*short), tmp_path / "plain")
    train(on_gpu(*short, "runtime.device=cpu"), tmp_path / "cpu")
    result = train(on_gpu(*short, "parallel=deepspeed", *ZERO[stage]), tmp_path / "zero")
    losses = {name: read_run(tmp_path / name).steps["loss"] for name in ("plain", "cpu", "zero")}
    assert losses["zero"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["zero"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert result.error["parameters"] == 0


@pytest.mark.parametrize("stage", ZERO)
def test_every_stage_on_one_device_meets_its_price(tmp_path, stage):
    """67 million parameters, beside which a workspace is little."""
    wide = ("model.width=1024", "model.num_heads=8", "model.mlp_width=4096", "model.num_layers=4", "train.steps=3")
    result = train(on_gpu(*wide, "parallel=deepspeed", *ZERO[stage]), tmp_path / "zero")
    predicted, measured = (kinds["peak_bytes"] for kinds in (result.predicted, result.measured))
    assert abs(measured - predicted) <= 0.05 * predicted + WORKSPACE
