"""What libraries take for a convolution: what is not measured is unknown, and what is goes into the peak."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from llmeff.core.cpu import INSTRUCTION_SETS, contained
from llmeff.cost import image_laws
from llmeff.cost.price import Price
from llmeff.cost.step import price_step
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from llmeff.cost.workspace import (
    FORMS,
    MEASURED,
    PRODUCTS,
    Convolution,
    Room,
    depthwise_room,
    is_torchs,
    matrix_bytes,
    room,
)

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
    x, y, weight = 4 * PIXELS * 32, 4 * PIXELS * 16, 4 * 16 * 32 * K * K
    shapes = {"x": (B, 25, H, W), "weight": (D, 25, K, K), "instruction_set": name}  # 25 channels fill 32 in either
    assert found("output", **shapes) == Room(during=x + weight, result=y)
    assert found("input", **shapes) == Room(during=y + weight, result=x)
    assert found("weight", **shapes) == Room(during=x + y, result=weight)


RESULTS = Path(__file__).parents[2] / "analysis" / "results" / "workspace.json"
"""What single products took: bytes that lived at once beside what a product read, itself included."""
ROWS = [
    (name, row["format"], *row["case"], row["product"], row["bytes"])
    for name, found in json.loads(RESULTS.read_text(encoding="utf-8")).items()
    for row in found["rows"]
    if row["format"] in MEASURED.get(name, {})
]


def test_what_single_products_took_is_what_their_form_says():
    """In float32 to the byte; in bfloat16 within 3 % of all that lived, since sums of threads are rounded up."""
    assert {(name, dtype) for name, dtype, *_ in ROWS} >= {
        (name, dtype) for name in ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_FP16") for dtype in ("float32", "bfloat16")
    }  # fmt: skip
    for name, dtype, images, inputs, outputs, kernel, *sides, product, measured in ROWS:
        x, weight, y = (images, inputs, *sides), (outputs, inputs, kernel, kernel), (images, outputs, *sides)
        own = FORMS[MEASURED[name][dtype]](Convolution(x=x, weight=weight, y=y, dtype=dtype, num_threads=1), product)
        num_bytes = {"float32": 4, "bfloat16": 2}[dtype]
        shapes = {"output": y, "input": x, "weight": weight}
        made = prod(shapes.pop(product)) * num_bytes
        foreseen = own.result + max(own.during, made)
        read = sum(map(prod, shapes.values())) * num_bytes
        least = 0.0 if dtype == "float32" else 0.03
        assert abs(foreseen - measured) <= least * (measured + read), (
            name,
            dtype,
            x,
            weight,
            product,
            foreseen,
            measured,
        )


def test_what_products_of_matrices_took_is_what_is_known_of_them():
    """On the sets with units for bfloat16 blocks are taken, of which nothing is."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {name for name, found in results.items() if found["matrices"]} == set(INSTRUCTION_SETS) & set(results)
    for name, found in results.items():
        for row in found["matrices"]:
            (rows, inputs, outputs), work = row["case"], replace(WORK, instruction_set=name)
            size = {"output": rows * outputs, "input": rows * inputs, "weight": inputs * outputs}[row["product"]]
            if row["format"] == "float32" or not {"AVX512_CORE_BF16"} & set(contained(name)):
                assert matrix_bytes(work, size, row["format"]) == row["bytes"], (name, row)
            else:
                assert row["bytes"] > matrix_bytes(work, size, row["format"]) == 0
    assert matrix_bytes(replace(WORK, instruction_set="AVX512_CORE", on_cpu=False), 100, "bfloat16") == 0


@pytest.mark.parametrize("sides", [(48, 64), (48, 48)])
def test_images_of_few_colours_are_read_as_they_lie(sides):
    x, weight, y = (B, 3, *sides), (D, 3, K, K), (B, D, *sides)
    pixels = B * sides[0] * sides[1]
    assert found("output", x=x, weight=weight, y=y) == Room(during=4 * 16 * 3 * K * K, result=4 * pixels * 16)
    assert found("weight", x=x, weight=weight, y=y) == Room(during=4 * pixels * 16, result=4 * 16 * 3 * K * K)
    # their gradient is not
    assert found("input", x=x, weight=weight, y=y).result == 4 * pixels * 8


@pytest.mark.parametrize(("name", "block"), [("AVX2", 8), ("AVX512_CORE", 16), ("AVX512_CORE_AMX", 16)])
def test_an_image_of_fewer_channels_than_a_block_is_copied_for_its_weights_alone(name, block):
    for inputs in (1, 2, 3, 4, block - 1, block):
        shapes = {"x": (B, inputs, H, W), "weight": (D, inputs, K, K)}
        output, weights = (found(product, instruction_set=name, **shapes) for product in ("output", "weight"))
        x, kernel = 4 * PIXELS * block, 4 * 16 * K * K
        assert output.during == (kernel * inputs if inputs < block else x + kernel * block)
        is_plain = inputs in ({3} if block == 8 else {1, 2, 3})
        kernels_block = 8 if 3 < inputs < 16 else block  # from 4 channels on those of AVX2 make few channels' weights
        y, filled = 4 * PIXELS * 16, -(-inputs // kernels_block) * kernels_block
        assert weights.during == (y if is_plain else y + 4 * PIXELS * filled)
        assert weights.result == kernel * (inputs if is_plain else filled)


@pytest.mark.parametrize("name", ["SSE41", "AVX", "AVX2"])
def test_torch_lays_out_all_patches_in_bfloat16(name):
    patches = 2 * PIXELS * C * K * K
    rooms = [found(product, "bfloat16", instruction_set=name) for product in PRODUCTS]
    nothing = Room(during=0, result=0)
    assert rooms == [Room(during=0, result=patches), nothing, Room(during=0, result=patches)]
    assert nothing == Room()
    pointwise = {"weight": (D, C, 1, 1), "dtype": "bfloat16", "instruction_set": name}
    assert [found(product, **pointwise) for product in PRODUCTS] == [Room()] * 3


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "AVX512_CORE_AMX"),
        ("bfloat16", "AVX512_CORE_AMX_FP16"),
        ("float32", "AVX512_CORE_AMX_FP16"),
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
    assert found(x=(B, C, 4, H, W), weight=(D, C, K, K, K), y=(B, D, 4, H, W)) is None  # over three


BF16 = {"dtype": "bfloat16", "num_threads": 2}


@pytest.mark.parametrize("name", ["AVX512_CORE", "AVX512_CORE_BF16"])
def test_a_kernel_in_bfloat16_adds_up_in_float32_in_every_thread(name):
    """A tall kernel of 5 by 3 on 2 threads, so that no side may stand for another; 25 and 11 channels fill 32 and 16."""
    x, y, weight = 2 * PIXELS * 32, 2 * PIXELS * 16, 2 * 16 * 32 * 15
    tall = {"x": (B, 25, H, W), "weight": (D, 25, 5, 3), "instruction_set": name, **BF16}
    assert found("output", **tall) == Room(during=x + weight, result=y)
    assert found("input", **tall) == Room(during=y + weight, result=x)
    sums = 4 * 16 * 32 * 15 + 2 * (16 + 32) * 48 * (64 + 4)  # and an image of either map, turned
    assert found("weight", **tall) == Room(during=x + y + 2 * sums, result=weight)
    # one side of 1 does not make it one of 1x1
    flat = tall | {"weight": (D, 25, 1, 3)}
    sums = 4 * 16 * 32 * 3 + 2 * (16 + 32) * 48 * (64 + 4)
    assert found("weight", **flat) == Room(during=x + y + 2 * sums, result=2 * 16 * 32 * 3)
    assert found("output", **flat) == Room(during=x + 2 * 16 * 32 * 3, result=y)
    # of 1x1 the map that is made is added up
    weight, one = 2 * 16 * 32, tall | {"weight": (D, 25, 1, 1)}
    assert found("output", **one) == Room(during=x + weight + 2 * 4 * 16 * H * W, result=y)
    assert found("input", **one) == Room(during=y + weight + 2 * 4 * 32 * H * W, result=x)
    assert found("weight", **one) == Room(during=x + y, result=weight)


def test_few_channels_in_bfloat16_are_not_copied():
    few = {"x": (B, 5, H, W), "instruction_set": "AVX512_CORE_BF16", **BF16}
    whole, part = few | {"weight": (16, 5, 5, 3), "y": (B, 16, H, W)}, few | {"weight": (D, 5, 5, 3)}
    assert found("output", **whole) == Room(during=2 * 16 * 6 * 15, result=2 * PIXELS * 16)  # by twos
    sums = 4 * 16 * 5 * 15 + 2 * 16 * 48 * (64 + 4)
    assert found("weight", **whole) == Room(during=2 * PIXELS * 16 + 2 * sums, result=2 * 16 * 5 * 15)
    # of kernels that fill no block a product of matrices takes an image's patches
    patches = 2 * 5 * 15 * H * W
    assert found("weight", **part) == Room(during=2 * (patches + 16 * D * 5 * 15), result=2 * D * 5 * 15)


def test_one_small_image_goes_without_the_library_whatever_the_set():
    small = {"x": (1, C, 32, 32), "y": (1, D, 32, 32), "instruction_set": None}
    assert found("output", **small) == Room(result=4 * C * K * K * 32 * 32)


@pytest.mark.parametrize(
    ("x", "kernel", "num_threads", "is_small"),
    [
        ((1, 5, 64, 64), (3, 3), 1, True),  # of 20,480 numbers
        ((1, 5, 64, 65), (3, 3), 1, False),
        ((2, 5, 8, 8), (3, 3), 1, False),
        ((1, 5, 8, 8), (3, 3), 4, True),
        ((1, 5, 8, 8), (4, 2), 1, False),
        ((1, 5, 8, 8), (2, 4), 1, False),
        ((1, 5, 8, 8), (1, 3), 1, True),
        # 1x1: few images, however large, on one thread
        ((1, 5, 640, 640), (1, 1), 1, True),
        ((15, 5, 64, 64), (1, 1), 1, True),
        ((16, 5, 8, 8), (1, 1), 1, False),
        ((1, 5, 8, 8), (1, 1), 2, False),
    ],
)
def test_torch_does_without_the_library_for_what_is_small(x, kernel, num_threads, is_small):
    """Where the set was not measured nothing else is known."""
    work, weight = replace(WORK, instruction_set=None, num_threads=num_threads), (D, 5, *kernel)
    assert is_torchs(work, x, weight, "float32") == is_small
    assert (room(work, "output", x, weight, (x[0], D, *x[2:]), "float32") is None) == (not is_small)
    assert not is_torchs(work, x, weight, "bfloat16")
    assert is_torchs(replace(work, instruction_set="AVX2"), x, weight, "bfloat16")
    assert not is_torchs(replace(work, on_cpu=False), x, weight, "float32")


def test_only_maps_of_one_size_are_columns_as_they_lie():
    """A kernel of 1x1 that leaves some places out reads patches."""
    work = {"dtype": "bfloat16", "weight": (D, C, 1, 1), "y": (B, D, H // 2, W // 2)}
    assert found("output", **work) == Room(result=2 * B * C * (H // 2) * (W // 2))
    assert found("output", dtype="bfloat16", weight=(D, C, 1, 3)) == Room(result=2 * PIXELS * C * 3)


def test_a_convolution_of_each_channel_takes_copies_for_its_weights_in_float32():
    shapes = (B, C, 70), (C, 1, 4), (B, C, 67)
    copies = Room(during=4 * (B * C * 70 + C * 4 + B * C * 67))
    assert [depthwise_room(WORK, product, *shapes, "float32") for product in PRODUCTS] == [Room(), Room(), copies]
    assert [depthwise_room(WORK, product, *shapes, "bfloat16") for product in PRODUCTS] == [Room()] * 3
    assert depthwise_room(replace(WORK, on_cpu=False, instruction_set=None), "weight", *shapes, "float32") == Room()


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
    with pytest.raises(ValueError, match="the total peak_bytes of this price is unknown"):
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
