"""Softmax attention against the formula written out, over every layout."""

import pytest
import torch
from torch import Tensor

from llmeff.attention import Softmax, flex
from llmeff.attention.heads import rotate
from llmeff.attention.mixer import MixerShape
from llmeff.attention.softmax import attend
from llmeff.core.layout import Layout

DEVICE = torch.device("cpu")


def written_out(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value


def heads(num: int, num_kv: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, num, queries, 8), torch.randn(2, num_kv, keys, 8), torch.randn(2, num_kv, keys, 8)


def packed(*lengths: int) -> Layout:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return Layout(positions=positions, documents=documents)


@pytest.mark.parametrize("num_kv", [4, 2, 1])
@pytest.mark.parametrize("past", [0, 3])
def test_causal_attention_after_cached_tokens(num_kv: int, past: int) -> None:
    query, key, value = heads(4, num_kv, 5, 5 + past)
    sees = torch.ones(5, 5 + past, dtype=torch.bool).tril(past)
    found = attend(query, key, value, Layout.plain(5, DEVICE, past=past))
    torch.testing.assert_close(found, written_out(query, key, value, sees))


def test_documents_see_only_themselves() -> None:
    query, key, value = heads(2, 2, 6, 6)
    layout = packed(1, 3, 2)
    found = attend(query, key, value, layout)
    alone = [
        attend(*(x[:, :, part] for x in (query, key, value)), Layout.plain(part.stop - part.start, DEVICE))
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(found, torch.cat(alone, dim=2))


def test_padding_is_seen_by_nobody_and_makes_no_nan() -> None:
    query, key, value = (x.requires_grad_() for x in heads(2, 2, 4, 4))
    padding = torch.tensor([[False, False, True, True], [True, True, True, True]])
    layout = Layout(positions=torch.arange(4)[None], padding=padding)
    found = attend(query, key, value, layout)
    torch.testing.assert_close(
        found[:1, :, 2:], attend(query[:1, :, 2:], key[:1, :, 2:], value[:1, :, 2:], Layout.plain(2, DEVICE))
    )
    torch.testing.assert_close(found[1:], attend(query[1:], key[1:], value[1:], Layout.plain(4, DEVICE)))
    found[padding[:, None].expand(-1, 2, -1)].sum().backward()
    assert found.isfinite().all()
    assert key.grad is not None
    assert value.grad is not None
    assert key.grad.isfinite().all()
    assert not value.grad[0, :, :2].any()


def test_room_in_a_cache_of_fixed_size_is_not_seen() -> None:
    query, key, value = heads(2, 2, 1, 8)
    layout = Layout(positions=torch.tensor([[3]]), padding=torch.tensor([[False, True, True, True]] * 2), past=3)
    found = attend(query, key, value, layout)
    sees = torch.tensor([[False, True, True, True, False, False, False, False]])
    torch.testing.assert_close(found, written_out(query, key, value, sees))


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    query, key, _ = heads(1, 1, 1, 1)

    def score(at: int, distance: int) -> Tensor:
        turned = [
            rotate(x, *Layout(positions=torch.tensor([[place]])).rotary(8, 100.0))
            for x, place in ((query, at), (key, at - distance))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(5, 3), score(40, 3), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(5, 3), score(5, 2))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_mixer_on_packed_documents_is_the_mixer_on_each(qk_norm: bool) -> None:
    torch.manual_seed(0)
    shape = MixerShape(width=16, num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, norm_eps=1e-5)
    mixer, x = Softmax(qk_norm=qk_norm).build(shape), torch.randn(1, 7, 16)
    alone = [mixer(part, Layout.plain(part.shape[1], DEVICE)) for part in x.split((4, 3), dim=1)]
    torch.testing.assert_close(mixer(x, packed(4, 3)), torch.cat(alone, dim=1))


class OnGpu(Tensor):
    """Numbers of this machine that say that they lie on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("kernel", "is_on_gpu", "is_plain", "made"),
    [
        ("sdpa", True, False, "bias"),
        ("sdpa", True, True, "nothing"),
        ("flex", False, False, "bias"),
        ("flex", True, False, "mask"),
        ("flex", True, True, "nothing"),
    ],
)
def test_on_a_gpu_flex_attention_has_its_mask_before_the_first_layer(
    kernel: str, is_on_gpu: bool, is_plain: bool, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = MixerShape(width=16, num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, norm_eps=1e-5)
    layout = Layout.plain(7, DEVICE) if is_plain else packed(4, 3)
    if is_on_gpu:
        layout = Layout(positions=layout.positions.as_subclass(OnGpu), documents=layout.documents)
    monkeypatch.setattr(flex, "_make", lambda layout, sees: "mask")
    monkeypatch.setattr(flex, "takes", lambda own, query, cache: own == "flex" and is_on_gpu)
    given: list[object] = []
    monkeypatch.setattr(flex, "attend", lambda query, key, value, mask: given.append(mask) or query)
    mixer = Softmax(kernel=kernel).build(shape)
    mixer.prepare(layout, 1, torch.float32)
    before = [list(layout._tables.values()), list(layout._biases)]
    assert before == {"bias": [[], [(7, torch.float32)]], "mask": [["mask"], []], "nothing": [[], []]}[made]
    mixer(torch.randn(1, 7, 16), layout)
    assert [list(layout._tables.values()), list(layout._biases)] == before
    assert given == (["mask"] if made == "mask" else [])


def test_flex_attention_lacks_a_gpu_on_the_cpu() -> None:
    shape = MixerShape(width=16, num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, norm_eps=1e-5)
    said = "mixer 'softmax': kernel 'flex' trains only on GPUs, but this run is on the CPU; use 'sdpa'"
    assert Softmax(kernel="flex").missing_requirements(shape, on_cpu=True) == [said]
    assert (
        Softmax(kernel="flex").missing_requirements(shape, on_cpu=False)
        == Softmax().missing_requirements(shape, on_cpu=True)
        == []
    )


def test_the_mask_of_flex_attention_sees_what_the_bias_lets_see(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = MixerShape(width=16, num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, norm_eps=1e-5)
    layout = packed(4, 3)
    made = []
    monkeypatch.setattr(flex, "_make", lambda layout, sees: made.append(sees))
    on_gpu = Layout(positions=layout.positions.as_subclass(OnGpu), documents=layout.documents)
    Softmax(kernel="flex").build(shape).prepare(on_gpu, 1, torch.float32)
    (sees,), mask = made, Layout.plain(4, DEVICE, past=1).mask(5)
    assert mask is not None
    places = torch.arange(-1, 4)
    expected = torch.zeros(5, 5, dtype=torch.bool)  # of padding, at place -1, and by it, nothing is seen
    expected[1:, 1:] = mask[0, 0, :, 1:]
    assert torch.equal(sees(places[:, None], places), expected)
