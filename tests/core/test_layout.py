"""Who sees whom: against a definition written out token by token."""

import pytest
import torch

from llmeff.core.layout import Layout

CPU = torch.device("cpu")


def sees(query: int, key: int, documents: list[int] | None, padding: list[bool] | None) -> bool:
    """Whether a token sees another, both by their places in a row."""
    if key > query or (padding is not None and not padding[key]):
        return False
    return documents is None or documents[query] == documents[key]


ROWS = {
    "documents": ([0, 0, 0, 1, 1, 2], None),
    "right padding": (None, [True, True, True, True, False, False]),
    "left padding": (None, [False, False, True, True, True, True]),
    "both": ([0, 0, 1, 1, 1, 1], [True, True, True, True, True, False]),
}


@pytest.mark.parametrize(("documents", "padding"), ROWS.values(), ids=ROWS)
def test_the_mask_is_the_definition(documents, padding):
    layout = Layout(
        positions=torch.arange(6)[None],
        documents=None if documents is None else torch.tensor([documents]),
        padding=None if padding is None else torch.tensor([padding]),
    )
    mask = layout.mask(6)[0, 0]
    for query in range(6):
        expected = [sees(query, key, documents, padding) for key in range(6)]
        assert mask[query].tolist() == (expected if any(expected) else [True] * 6)


def test_a_plain_row_needs_no_mask():
    layout = Layout.plain(5, CPU)
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert layout.mask(5) is None
    assert layout.bias(5, torch.float32) is None


def test_new_tokens_see_the_cache_and_no_room_that_is_empty():
    layout = Layout(positions=torch.tensor([[3, 4]]), padding=torch.tensor([[False, True, True, True, True]]), past=3)
    assert layout.mask(7)[0, 0].int().tolist() == [[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert Layout.plain(2, CPU, past=3).mask(7)[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_the_mask_and_made_once(dtype):
    layout = Layout(positions=torch.arange(4)[None], documents=torch.tensor([[0, 0, 1, 1]]))
    bias = layout.bias(4, dtype)
    assert bias.dtype == dtype
    assert torch.equal(bias == 0, layout.mask(4))
    assert torch.equal(bias.isneginf(), ~layout.mask(4))
    assert layout.bias(4, dtype) is bias


def test_rotary_angles_are_the_formula():
    positions = torch.tensor([[0, 1, 2, 0, 1, 7]])
    cos, sin = Layout(positions=positions).rotary(8, 100.0)
    assert cos.shape == sin.shape == (1, 1, 6, 8)
    for place, position in enumerate(positions[0].tolist()):
        for pair in range(4):
            angle = torch.tensor(position * 100.0 ** (-2 * pair / 8), dtype=torch.float64)
            for half in (pair, pair + 4):
                assert float(cos[0, 0, place, half]) == pytest.approx(float(angle.cos()), abs=1e-6)
                assert float(sin[0, 0, place, half]) == pytest.approx(float(angle.sin()), abs=1e-6)


def test_rotary_products_depend_on_distance_alone():
    x, y = torch.randn(2, 8)

    def turned(vector, place):
        cos, sin = (table[0, 0, place] for table in Layout.plain(20, CPU).rotary(8, 10_000.0))
        return vector * cos + torch.cat((-vector[4:], vector[:4])) * sin

    assert float(turned(x, 3) @ turned(y, 5)) == pytest.approx(float(turned(x, 15) @ turned(y, 17)), abs=1e-5)
