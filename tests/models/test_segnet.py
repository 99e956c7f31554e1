"""SegNet against a plain reading of its description, against itself, and against its law."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.core.config import ConfigError, validate
from llmeff.cost.workload import Workload
from llmeff.models import ImageModelConfig, SegNetBasic, SegNetVGG
from llmeff.models.image_model import Preparation, load_image_model, save_image_model
from llmeff.models.image_norm import EPS
from llmeff.models.segnet import SegNet, pool, unpool

KINDS: dict[str, type[ImageModelConfig]] = {"segnet": SegNetVGG, "segnet-basic": SegNetBasic}
CONNECTIONS = ("none", "add", "concat", "concat1x1")
CLASSES = 3

every_kind = pytest.mark.parametrize("kind", KINDS)
every_connection = pytest.mark.parametrize("connection", CONNECTIONS)


def config(kind: str = "segnet-basic", **fields: Any) -> Any:
    return validate(KINDS[kind], {"num_classes": CLASSES, "width": 4, "norm_groups": 2} | fields)


def build(kind: str = "segnet-basic", *, seed: int = 0, **fields: Any) -> SegNet:
    torch.manual_seed(seed)
    model: SegNet = config(kind, **fields).build()
    return model


def pictures(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(model: SegNet, seed: int = 2) -> SegNet:
    """With biases, scales and statistics that are not those of the beginning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in model.named_buffers():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if name.endswith("var") else 0.0))
    return model


# -- sizes


def num_parameters(kind: str, **fields: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(kind, num_classes=11, width=64, **fields).parameters())


def test_parameters_at_eleven_classes():
    assert num_parameters("segnet") == 29_449_355
    assert num_parameters("segnet-basic") == 1_416_587


@pytest.mark.parametrize(("connection", "more"), [("add", 0), ("concat", 5_492_736), ("concat1x1", 1_220_608)])
def test_what_connections_add_to_the_parameters(connection, more):
    assert num_parameters("segnet", connection=connection) == 29_449_355 + more


@every_kind
@every_connection
def test_residual_blocks_add_no_parameter(kind, connection):
    plain, residual = (build(kind, connection=connection, residual_blocks=own) for own in (False, True))
    ours, theirs = dict(residual.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(map(torch.equal, ours.values(), theirs.values()))


@every_kind
@every_connection
@pytest.mark.parametrize("norm", ["batch", "batch_sync", "group", "frozen"])
def test_the_law_names_the_models_parameters_in_their_order(kind, connection, norm):
    asked = config(kind, connection=connection, norm=norm)
    model = asked.build()
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(weight.name, weight.shape) for weight in asked.weights()] == built
    assert list(asked.roles().items()) == list(model.roles().items())
    assert asked.buffer_bytes(4) == sum(buffer.nbytes for buffer in model.buffers())


def test_roles():
    roles = build("segnet", connection="concat1x1").roles()
    assert {name: roles[name] for name in ("encoder.1.convs.0.weight", "decoder.2.join.weight", "head.weight")} == {
        "encoder.1.convs.0.weight": "conv", "decoder.2.join.weight": "conv", "head.weight": "head",
    }  # fmt: skip
    assert {roles[name] for name in roles if ".norms." in name} == {"norm"}
    assert {roles[name] for name in roles if name.endswith("bias") and ".norms." not in name} == {"bias"}


# -- what it computes


@every_kind
@pytest.mark.parametrize("size", [(180, 240), (45, 70), (33, 47)])
def test_every_pixel_has_logits_whatever_the_size(kind, size):
    model = build(kind, width=2, norm_groups=1, connection="add")
    assert model(pictures(2, 3, *size)).shape == (2, CLASSES, *size)


def unpooled(values: Tensor, places: Tensor, size: torch.Size) -> Tensor:
    """Zeros, with each value where its maximum was."""
    flat = torch.zeros(*values.shape[:2], size[-2] * size[-1]).scatter(2, places.flatten(2), values.flatten(2))
    return flat.view(*values.shape[:2], *size[-2:])


def keep_channels(convs: nn.ModuleList) -> list[int]:
    """The places of the longest run of convolutions with as many channels out as in, the first of equals."""
    runs: list[list[int]] = [[]]
    for place, conv in enumerate(convs):
        same_as_before = runs[-1] and convs[place - 1].out_channels == conv.out_channels
        if conv.in_channels != conv.out_channels:
            runs.append([])
        elif same_as_before or not runs[-1]:
            runs[-1].append(place)
    return max(runs, key=len)


def reference(model: SegNet, images: Tensor) -> Tensor:
    """The logits by given statistics, as the description has them, one operation after the other."""
    asked, tensors = model.config, dict(model.state_dict())

    def stage(path: str, x: Tensor, convs: nn.ModuleList, has_relu: bool) -> Tensor:
        around = keep_channels(convs) if asked.residual_blocks else []
        for place in range(len(convs)):
            if around and place == around[0]:
                shortcut = x
            conv, norm = f"{path}.convs.{place}.", f"{path}.norms.{place}."
            x = F.conv2d(x, tensors[conv + "weight"], tensors[conv + "bias"], padding="same")
            mean, var, scale, shift = (
                tensors[norm + name].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (var + EPS).sqrt() * scale + shift
            if around and place == around[-1]:
                x = x + shortcut
            x = x.clamp(min=0) if has_relu else x
        return x

    x, kept = images, []
    for number, encoder in enumerate(model.encoder):
        x = stage(f"encoder.{number}", x, encoder.convs, True)
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        kept.append((x, places))
        x = pooled
    for number, decoder in enumerate(model.decoder):
        skipped, places = kept.pop()
        x = unpooled(x, places, skipped.shape)
        if asked.connection == "add":
            x = x + skipped
        elif asked.connection != "none":
            x = torch.cat([x, skipped], 1)
        if asked.connection == "concat1x1":
            x = torch.einsum("oi,bihw->bohw", tensors[f"decoder.{number}.join.weight"][..., 0, 0], x)
        x = stage(f"decoder.{number}", x, decoder.convs, isinstance(asked, SegNetVGG))
    return F.conv2d(x, tensors["head.weight"], tensors["head.bias"], padding="same")


@every_kind
@every_connection
@pytest.mark.parametrize("residual_blocks", [False, True])
def test_it_is_what_its_description_says(kind, connection, residual_blocks):
    model = moved(build(kind, connection=connection, residual_blocks=residual_blocks)).eval()
    images = pictures(2, 3, 45, 70)
    expected = reference(model, images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


def test_max_unpooling_puts_each_value_back_in_its_place():
    x = pictures(2, 3, 7, 9)
    values, places = F.max_pool2d(x, 2, return_indices=True)
    found = F.max_unpool2d(values, places, (2, 2), output_size=[7, 9])
    assert torch.equal(found, unpooled(values, places, x.shape))
    assert torch.equal(found, torch.where(found != 0, x, 0))
    assert (found != 0).sum() == values.numel()


@every_kind
def test_none_and_add_begin_as_the_same_model(kind):
    none, add = (build(kind, connection=connection).state_dict() for connection in ("none", "add"))
    assert none.keys() == add.keys()
    assert all(torch.equal(none[name], add[name]) for name in none)
    images = pictures(2, 3, 32, 32)
    assert not torch.equal(build(kind)(images), build(kind, connection="add")(images))


@every_kind
def test_the_variance_of_initial_weights_is_that_of_he(kind):
    for name, parameter in build(kind, width=16).named_parameters():
        if parameter.dim() > 1 and parameter.numel() > 500:
            assert parameter.var().item() == pytest.approx(2 / parameter[0].numel(), rel=0.25), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, ".norms." in name and name.endswith("weight")))


# -- gradients


@pytest.mark.parametrize(
    "fields",
    [
        {"norm": "frozen", "connection": "none"},
        {"norm": "batch", "connection": "add", "residual_blocks": True},
        {"norm": "group", "connection": "concat"},
        {"norm": "batch_sync", "connection": "concat1x1"},
    ],
    ids=str,
)
def test_gradients_are_the_slopes_in_float64(fields):
    model = moved(build(width=2, norm_groups=1, **fields)).double()
    names = [name for name, _ in model.named_parameters()]

    def logits(images: Tensor, *parameters: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (images,))
        return found

    given = [pictures(2, 3, 17, 19).double(), *(own.detach() for own in model.parameters())]
    assert torch.autograd.gradcheck(logits, [own.requires_grad_() for own in given], fast_mode=True)


def two_steps(model: SegNet) -> list[Tensor]:
    """Losses, the gradients of both steps together, and buffers."""
    losses = []
    for step in range(2):
        images, labels = pictures(2, 3, 45, 37, seed=step), torch.arange(2 * 45 * 37).view(2, 45, 37) % CLASSES
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(own.grad for own in model.parameters() if own.grad is not None), *model.buffers()]


@every_kind
@pytest.mark.parametrize("norm", ["batch", "batch_sync", "group", "frozen"])
def test_recomputed_stages_give_the_same_losses_gradients_and_running_statistics(kind, norm):
    plain = build(kind, connection="concat1x1", residual_blocks=True, norm=norm)
    again = copy.deepcopy(plain)
    again.recompute = True
    found, expected = two_steps(again), two_steps(plain)
    assert len(found) == len(expected) == 2 + len([*plain.parameters(), *plain.buffers()])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("by_stage", [False, True], ids=["whole", "stage by stage"])
def test_torch_compile_takes_it_whole(by_stage, recompute):
    plain = build(connection="add", residual_blocks=True)
    plain.recompute = recompute
    compiled = copy.deepcopy(plain)
    for part in compiled.layers if by_stage else [compiled]:
        part.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2 * len(compiled.layers)):
        found = two_steps(compiled)
    for values, expected in zip(found, two_steps(plain), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_what_is_repeatable_pools_and_unpools_as_torch_does(size, monkeypatch):
    x = torch.randn(2, 3, *size, requires_grad=True)

    def there_and_back():
        pooled, indices = pool(x)
        back = unpool(pooled**2, indices, list(size))
        return pooled, indices, back, torch.autograd.grad((back**2 / 2).sum() + pooled.sum(), x)[0]

    expected = there_and_back()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for found, plain in zip(there_and_back(), expected, strict=True):
        assert torch.equal(found, plain)


def test_nothing_is_run_again_where_nothing_is_learnt():
    model = moved(build("segnet", width=2, norm_groups=1)).eval()
    images = pictures(2, 3, 32, 32)
    plain = model(images)
    model.recompute = True
    assert torch.equal(model(images), plain)
    with torch.no_grad():
        assert torch.equal(model(images), plain)


# -- files


@every_kind
def test_a_saved_model_gives_the_same_logits(kind, tmp_path):
    model = moved(build(kind, connection="concat", norm="batch_sync")).eval()
    images = pictures(2, 3, 45, 70)
    classes = ("sky", "road", "tree")
    about = Preparation(classes=classes, mean=(0.25, 0.5, 0.75), std=(0.1, 0.2, 0.3), size=(45, 70))
    save_image_model(model, tmp_path / "model", about)
    again, found = load_image_model(tmp_path / "model")
    assert found == about
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(images), model(images))


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        load_image_model(tmp_path)
    about = Preparation(classes=("a", "b", "c"), mean=(0, 0, 0), std=(1, 1, 1), size=(16, 16))
    save_image_model(build(), tmp_path, about)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be loaded"):
        load_image_model(tmp_path)
    save_image_model(build(width=6), tmp_path / "other", about)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"encoder\.0\.convs\.0\.weight has shape \(6, 3, 7, 7\), but the model needs \(4, 3, 7, 7\)"
    ):
        load_image_model(tmp_path)


# -- what cannot be


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 0}, "width: Input should be greater than or equal to 1"),
        ({"width": 12, "norm": "group", "norm_groups": 8}, "norm_groups is 8, but a convolution has 12 channels"),
        ({"norm_groups": 0}, "norm_groups: Input should be greater than or equal to 1"),
        ({"connection": "sum"}, "connection: Input should be 'none', 'add', 'concat' or 'concat1x1'"),
        ({"norm": "layer"}, "norm: Input should be 'batch', 'batch_sync', 'group' or 'frozen'"),
        ({"residual_block": True}, "Did you mean 'residual_blocks'"),
    ],
)
def test_shapes_that_cannot_be(fields, said):
    with pytest.raises(ConfigError, match=said):
        config(**fields)


def test_groups_need_not_divide_what_they_do_not_norm():
    assert config(width=5, norm="batch").norm_groups == 2


@pytest.mark.parametrize(("kind", "least"), [("segnet", 32), ("segnet-basic", 16)])
def test_images_that_are_too_small(kind, least):
    def problems(*size: int, **more: Any) -> list[str]:
        work = Workload(num_sequences=1, num_tokens=size[0] * size[1], image_size=(size[0], size[1]), **more)
        return list(config(kind).problems(work))

    assert not problems(least, least)
    (small,) = problems(least, least - 1)
    assert f"at least {least} pixels a side, but these have {least} x {least - 1}" in small
    build(kind, width=2, norm_groups=1)(pictures(1, 3, least, least))
    (wrong,) = problems(least, least, precision_name="bf16_master")
    assert "use 'bf16'" in wrong


def test_classes_that_are_still_to_be_resolved():
    with pytest.raises(ValueError, match="num_classes is auto"):
        SegNetVGG().build()
