"""What libraries take for a convolution: what is not measured is unknown, and what is goes into the peak."""

from dataclasses import replace

import pytest

from llmeff.core.cpu import INSTRUCTION_SETS
from llmeff.cost import image_laws
from llmeff.cost.price import Price
from llmeff.cost.step import price_step
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from llmeff.cost.workspace import FORMS, MEASURED, PRODUCTS, Room, depthwise_room, room

B, C, D, H, W, K = 2, 5, 11, 48, 64, 3
X, WEIGHT, Y = (B, C, H, W), (D, C, K, K), (B, D, H, W)
PIXELS = B * H * W
WORK = Workload(num_sequences=B, num_tokens=H * W, image_size=(H, W), instruction_set="AVX2")


def found(product="output", dtype="float32", x=X, weight=WEIGHT, y=Y, **work):
    return room(replace(WORK, **work), product, x, weight, y, dtype)


def test_every_row_names_a_form_of_a_set():
    assert set(MEASURED) <= set(INSTRUCTION_SETS)
    assert {form for row in MEASURED.values() for form in row.values()} == set(FORMS)


@pytest.mark.parametrize(("name", "block"), [("AVX2", 8), ("AVX512_CORE", 16), ("AVX512_CORE_AMX", 16)])
def test_channels_fill_whole_blocks(name, block):
    x, y, weight = 4 * PIXELS * block, 4 * PIXELS * 16, 4 * 16 * block * K * K
    assert found("output", instruction_set=name) == Room(during=x + weight, result=y)
    assert found("input", instruction_set=name) == Room(during=y + weight, result=x)
    assert found("weight", instruction_set=name) == Room(during=x + y, result=weight)


@pytest.mark.parametrize("sides", [(48, 64), (48, 48)])
def test_images_of_few_colours_are_read_as_they_lie(sides):
    x, weight, y = (B, 3, *sides), (D, 3, K, K), (B, D, *sides)
    pixels = B * sides[0] * sides[1]
    assert found("output", x=x, weight=weight, y=y) == Room(during=4 * 16 * 3 * K * K, result=4 * pixels * 16)
    assert found("weight", x=x, weight=weight, y=y) == Room(during=4 * pixels * 16, result=4 * 16 * 3 * K * K)
    # their gradient is not
    assert found("input", x=x, weight=weight, y=y).result == 4 * pixels * 8


@pytest.mark.parametrize("name", ["SSE41", "AVX", "AVX2"])
def test_torch_lays_out_all_patches_in_bfloat16(name):
    patches = 2 * PIXELS * C * K * K
    rooms = [found(product, "bfloat16", instruction_set=name) for product in PRODUCTS]
    assert rooms == [Room(result=patches), Room(), Room(result=patches)]
    pointwise = {"weight": (D, C, 1, 1), "dtype": "bfloat16", "instruction_set": name}
    assert [found(product, **pointwise) for product in PRODUCTS] == [Room()] * 3


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "AVX512_CORE_AMX"),
        ("bfloat16", "AVX512_CORE_FP16"),
        ("float32", "AVX512_CORE_FP16"),
        ("float32", "AVX"),
        ("float32", None),
        ("bfloat16", None),
    ],
)
def test_what_was_not_measured_is_unknown(dtype, name):
    assert [found(product, dtype, instruction_set=name) for product in PRODUCTS] == [None] * 3
    work = replace(WORK, instruction_set=name)
    assert depthwise_room(work, "output", (B, C, 70), (C, 1, 4), (B, C, 67), dtype) is None
    assert found("output", dtype, instruction_set=name, on_cpu=False) == Room()


def test_kinds_of_convolutions_that_were_not_measured_are_unknown():
    assert found(x=(B, 8, H, W), weight=(D, 4, K, K)) is None  # of two groups
    assert found(x=(B, C, W), weight=(D, C, K), y=(B, D, W)) is None  # over one dimension


@pytest.mark.parametrize("name", ["AVX512_CORE", "AVX512_CORE_BF16"])
def test_a_kernel_in_bfloat16_adds_up_in_float32_in_every_thread(name):
    """A tall kernel of 5 by 3 on 2 threads, so that no side may stand for another; blocks of 16 channels."""
    work = {"dtype": "bfloat16", "instruction_set": name, "num_threads": 2}
    x, y, weight = 2 * PIXELS * 16, 2 * PIXELS * 16, 2 * 16 * 16 * 15
    tall = {"weight": (D, C, 5, 3), **work}
    assert found("output", **tall) == Room(during=x + weight, result=y)
    assert found("input", **tall) == Room(during=y + weight, result=x)
    sums = 4 * 16 * 16 * 15 + 2 * (16 + 16) * 48 * (64 + 4)  # and an image of either map, turned
    assert found("weight", **tall) == Room(during=x + y + 2 * sums, result=weight)
    # few colours are read as they lie, and not turned
    plain = {"x": (B, 3, H, W), "weight": (D, 3, 5, 3), **work}
    sums = 4 * 16 * 16 * 15 + 2 * 16 * 48 * (64 + 4)
    assert found("weight", **plain) == Room(during=y + 2 * sums, result=2 * 16 * 3 * 15)
    # of 1x1 the map that is made is added up
    weight, one = 2 * 16 * 32, {"x": (B, 20, H, W), "weight": (D, 20, 1, 1), **work}
    assert found("output", **one) == Room(during=2 * x + weight + 2 * 4 * 16 * H * W, result=y)
    assert found("input", **one) == Room(during=y + weight + 2 * 4 * 32 * H * W, result=2 * x)
    assert found("weight", **one) == Room(during=2 * x + y, result=weight)


def test_one_small_image_goes_without_the_library_whatever_the_set():
    small = {"x": (1, C, 32, 32), "y": (1, D, 32, 32), "instruction_set": None}
    assert found("output", **small) == Room(result=4 * C * K * K * 32 * 32)


def law(tape: Tape, batch: image_laws.Images):
    y = image_laws.convolution(tape, batch.images, tape.weight("weight", D, 3, K, K), None)
    return image_laws.cross_entropy(tape, y, batch)


def priced(name, **work):
    return price_step(law, replace(WORK, instruction_set=name, **work), given=image_laws.Images)


def test_the_peak_is_unknown_where_the_workspace_is():
    known, unknown = priced("AVX2"), priced(None)
    assert known.unknown == frozenset()
    assert known.total("workspace_bytes") == 4 * PIXELS * 16 + 4 * 16 * 3 * K * K
    assert unknown.unknown == {"workspace_bytes", "peak_bytes"}
    assert unknown.known("peak_bytes") is None
    with pytest.raises(ValueError, match="peak_bytes is unknown here"):
        unknown.total("peak_bytes")
    assert 0 < unknown.at_least("peak_bytes") <= known.total("peak_bytes")
    for kind in ("parameters", "gradient_bytes", "saved_bytes", "executed_flops"):
        assert unknown.total(kind) == known.total(kind) > 0, kind


def test_it_stays_unknown_in_sums_and_in_json():
    unknown = priced(None)
    for price in (unknown + Price({("peak_bytes", "optimizer"): 8}), 2 * unknown, unknown.only(["peak_bytes"])):
        assert price.known("peak_bytes") is None
        data = price.as_dict()
        assert data["peak_bytes"]["total"] is None
        assert data["peak_bytes"]["at_least"] == price.at_least("peak_bytes")
        assert Price.from_dict(data) == price
    assert unknown.only(["parameters"]).unknown == frozenset()


def test_another_set_takes_another_workspace_and_changes_nothing_else():
    narrow, wide = priced("AVX2"), priced("AVX512_CORE_AMX")
    others = set(narrow.as_dict()) - {"workspace_bytes", "peak_bytes"}
    assert {kind: narrow.as_dict()[kind] for kind in others} == {kind: wide.as_dict()[kind] for kind in others}
