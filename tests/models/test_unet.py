"""The U-Net of segmentation-models-pytorch: by the library where it can be imported, and by a small one in its place."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.cpu import instruction_set
from llmeff.core.meters import count_flops, peak_bytes, saved_bytes
from llmeff.cost.workload import Workload
from llmeff.models import UNet
from llmeff.models.image_model import load_image_model
from llmeff.models.image_norm import averaged
from llmeff.plan.price import plan, price_step
from llmeff.run.loop import train
from tests.prices import run_of

NAME = "segmentation_models_pytorch"


class Small(nn.Module):
    """As the library's networks are put together: an encoder, a decoder and a head."""

    def __init__(self, encoder, *, encoder_weights, decoder_channels, classes):
        super().__init__()
        assert encoder_weights is None
        width = decoder_channels[-1]
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, width, 3, padding=1), nn.ReLU())
        self.segmentation_head = nn.Sequential(nn.Conv2d(width, classes, 3, padding=1), nn.Identity())

    def forward(self, images):
        return self.segmentation_head(self.decoder(self.encoder(images)))


@pytest.fixture(params=["stand-in", "library"])
def library(request, monkeypatch):
    """What `import segmentation_models_pytorch` gives."""
    if request.param == "stand-in":
        module = types.ModuleType(NAME)
        module.__version__ = "0"
        module.Unet = Small
        module.encoders = types.SimpleNamespace(get_encoder_names=lambda: ["resnet18", "resnet34"])
        monkeypatch.setitem(sys.modules, NAME, module)
        return module
    try:
        import segmentation_models_pytorch
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{NAME} cannot be imported: {error}")
    return segmentation_models_pytorch


CONFIG = UNet(num_classes=5)
SAVED = {"fp32": 0, "bf16": 1e-3}
"""A trace takes the statistics of BatchNorm under autocast for narrower than they are."""


def test_every_parameter_has_its_role(library):
    roles = CONFIG.roles()
    model = CONFIG.build()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert roles.keys() == shapes.keys()
    heads = [shapes[name] for name, role in roles.items() if role == "head"]
    assert heads == [(5, 16, 3, 3)]
    for name, role in roles.items():
        assert (len(shapes[name]) == 4) == (role in ("conv", "head")), name
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name, _ in module.named_parameters()
    }
    assert {name for name, role in roles.items() if role == "norm"} == norms


@pytest.mark.parametrize("size", [(64, 96), (45, 60), (33, 64)])
def test_logits_are_as_large_as_the_images(library, size):
    model = CONFIG.build().eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, *size)).shape == (2, 5, *size)


def test_the_library_builds_what_is_known_as_u_net_on_resnet34(library):
    if library.Unet is Small:
        pytest.skip("a stand-in is small")
    resnet = 21_797_672 - 513_000  # He et al. 2016, as torchvision has it, less its linear layer
    widths = [(512 + 256, 256), (256 + 128, 128), (128 + 64, 64), (64 + 64, 32), (32, 16)]
    decoder = sum(9 * before * own + 2 * own + 9 * own * own + 2 * own for before, own in widths)
    model = UNet(num_classes=11, encoder="resnet34").build()
    assert sum(parameter.numel() for parameter in model.parameters()) == resnet + decoder + 11 * (16 * 9 + 1)


@pytest.mark.parametrize("changes", [{}, {"precision_name": "bf16"}], ids=["fp32", "bf16"])
def test_its_trace_is_what_a_step_takes(library, changes):
    work = Workload(
        num_sequences=2,
        num_tokens=96 * 128,
        image_size=(96, 128),
        num_threads=torch.get_num_threads(),
        instruction_set=instruction_set(),
        **changes,
    )
    price = price_step(run_of(CONFIG), work)
    model, batch = CONFIG.build(), CONFIG.example(work)
    held = [*model.parameters(), *model.buffers(), *batch.values()]

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=work.precision.autocast):
            return CONFIG.loss(model, batch)

    def step():
        forward().backward()

    measured = count_flops(step)
    model.zero_grad(set_to_none=True)
    assert price.source == "traced"
    assert price.total("parameters") == sum(parameter.numel() for parameter in model.parameters())
    assert price.total("executed_flops") == measured
    assert price.total("saved_bytes") == pytest.approx(saved_bytes(forward, held), rel=SAVED[work.precision_name])
    peak = peak_bytes(step, held, torch.device("cpu")) + price.total("optimizer_bytes")
    if price.known("peak_bytes") is None:
        assert price.at_least("peak_bytes") < peak
    else:
        assert price.total("peak_bytes") == pytest.approx(peak, rel=0.01)


TINY = {
    "task": {"name": "segmentation", "recomputed_norms": 4},
    "model": {"name": "unet"},
    "data": {
        "name": "images",
        "source": {
            "name": "scenes", "height": 96, "width": 128, "num_train": 8, "num_search": 0, "num_validation": 2,
            "num_test": 0,
        },
    },
    "schedule": {"name": "constant"},
    "train": {"steps": 4, "batch": 2},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 0},
    "runtime": {"device": "cpu", "threads": 1},
}  # fmt: skip


def config(*settings):
    return validate(RunConfig, override(TINY, settings))


def test_it_is_trained_by_the_loop_with_its_prediction_beside_what_was_measured(library, tmp_path):
    result = train(config(), tmp_path / "run")
    assert result.prediction == "traced"
    for kind in ("parameters", "executed_flops", "optimizer_bytes"):
        assert result.error[kind] == 0, kind
    assert abs(result.error["saved_bytes"]) < 1e-3
    if "peak_bytes" in result.predicted:  # it is left out where the CPU's instruction set was not measured
        assert abs(result.error["peak_bytes"]) < 0.01
    assert np.isfinite(result.metrics["validation"]["mean_iou"])
    model, preparation = load_image_model(tmp_path / "run" / "model")
    assert model.config == UNet(num_classes=11)
    assert len(preparation.classes) == 11
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 3, 32, 64))).all()


def test_no_peak_is_predicted_where_the_instruction_set_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("llmeff.plan.price.instruction_set", lambda: None)
    segnet = {"name": "segnet-basic", "width": 8}
    result = train(validate(RunConfig, TINY | {"model": segnet}), tmp_path / "run")
    assert "peak_bytes" in result.measured
    assert {"peak_bytes", "workspace_bytes"}.isdisjoint(result.predicted.keys() | result.error.keys())
    assert result.error["executed_flops"] == result.error["parameters"] == 0


def test_what_it_cannot_is_an_error(library, tmp_path):
    with pytest.raises(
        ConfigError, match=r"runtime\.recompute is true, but model 'unet' does not support it: use false"
    ):
        plan(config("runtime.recompute=true"))
    with pytest.raises(ConfigError, match="needs images of at least 32 pixels a side, but these have 16 x 128"):
        plan(config("data.source.height=16"))
    with pytest.raises(ConfigError, match=r"has no encoder 'resnet-18'\. Did you mean 'resnet18'\?"):
        train(config("model.encoder=resnet-18"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_the_library_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, NAME, None)
    with pytest.raises(ConfigError, match=r'model "unet" needs segmentation-models-pytorch: pip install "llmeff\[seg'):
        train(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_torchvision_of_another_torch_is_named(monkeypatch, tmp_path):
    (tmp_path / f"{NAME}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(
        ConfigError, match=r"\(operator torchvision::nms does not exist\): install the torchvision that"
    ):
        CONFIG.build()


def test_torchs_own_norms_are_averaged_too():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.3).eval()
    batches = [torch.randn(2, 3, 4, 4) * (number + 1) for number in range(3)]
    averaged(nn.Sequential(norm), batches)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    assert norm.running_mean == pytest.approx(means, abs=1e-6)
    assert (norm.momentum, norm.training) == (0.3, False)
