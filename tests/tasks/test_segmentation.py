"""Segmentation's loss and evaluation: cases of two by two pixels by hand, torch's own cross-entropy, and split steps."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.dist import world
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.core.seed import derive
from llmeff.data import TextData
from llmeff.data.images import ImageData
from llmeff.models import DecoderConfig, SegNetBasic, SegNetVGG
from llmeff.models.image_norm import averaged
from llmeff.models.pixel_loss import pixel_losses, weighted_loss
from llmeff.record.reader import read_run
from llmeff.run.loop import train
from llmeff.tasks import Segmentation, segmentation
from llmeff.tasks.segmentation import class_weights
from tests.ranks import ranks

X = IGNORED_PIXEL
CPU = torch.device("cpu")
SMALL = {
    "train": [[[0, 1], [1, X]], [[0, 0], [0, 1]], [[2, 2], [0, 0]]],
    "validation": [[[0, 1], [X, 1]], [[X, X], [X, X]]],
}
"""Labels of two by two pixels. Of the training images: 0 has six pixels of the eleven in images that hold it, 1 three of
seven, 2 two of four."""


def write(folder: Path, masks: dict[str, Any]) -> dict[str, Any]:
    """Pictures of noise with these labels, by split; their source."""
    rng = np.random.default_rng(0)
    for split, labels in masks.items():
        for number, mask in enumerate(np.asarray(labels, np.uint8)):
            for kind, pixels in (("images", rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)), ("masks", mask)):
                path = folder / kind / split / f"{number:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    source = {"name": "folder", "path": str(folder / "images"), "masks": str(folder / "masks")}
    return source | {"class_names": ["a", "b", "c"]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small"), SMALL)


def opened(source: dict[str, Any], *, batch_size: int = 3, **fields: Any) -> Any:
    data = validate(ImageData, {"source": source})
    return validate(Segmentation, fields).open(data, 0, batch_size, is_main=True, wait=lambda: None)


class Fixed(nn.Module):
    """Gives the same logits whatever the images."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[0] == self.logits.shape[0]
        return self.logits


def logits_of(num_images: int, height: int = 2, width: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed))


# -- the loss


def test_the_loss_by_hand():
    """Probabilities of class 1: 1/4, 3/4, 1/2, and 9/10 where nothing is labelled."""
    second = torch.tensor([[[0.25, 0.75], [0.5, 0.9]]])
    logits = torch.stack([1 - second, second], 1).log().requires_grad_()
    loss = weighted_loss(logits, torch.tensor([[[0, 1], [1, X]]]), torch.tensor([2.0, 3.0]))
    assert loss.item() == pytest.approx(2 * -math.log(0.75) + 3 * -math.log(0.75) + 3 * -math.log(0.5))
    loss.backward()
    expected = [[[2 * -0.25, 3 * 0.25], [3 * 0.5, 0]], [[2 * 0.25, 3 * -0.25], [3 * -0.5, 0]]]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.tensor(expected))


FREQUENCIES = np.array([6 / 11, 3 / 7, 2 / 4])


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0.0, [1, 1, 1]),
        (0.5, [math.sqrt(0.5 * 11 / 6), math.sqrt(0.5 * 7 / 3), 1]),
        (1.0, [0.5 * 11 / 6, 0.5 * 7 / 3, 1]),
    ],
)
def test_class_weights_by_hand(small, balance, expected):
    assert opened(small, balance=balance).weights == pytest.approx(expected)


def test_a_class_that_training_never_sees_weighs_one():
    pixels, present = np.array([4, 0, 2]), np.array([8, 0, 8])
    assert class_weights(pixels, present, 1.0) == pytest.approx([0.75, 1, 1.5])


def test_a_class_of_one_pixel_weighs_as_what_it_is():
    assert class_weights(np.array([4, 1]), np.array([8, 8]), 1.0) == pytest.approx([5 / 8, 5 / 2])


def test_a_batch_goes_to_the_device_without_a_wait_and_to_a_cpu_as_a_copy(small, monkeypatch):
    task, copied, copy = opened(small), [], Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda own, *to, **how: copied.append((to, how)) or copy(own, *to, **how))
    meta = torch.device("meta")
    task.batch(0, range(2), meta)
    assert copied == [((meta,), {"non_blocking": True})] * 2
    values = np.zeros(3, np.float32)
    task._on(values, CPU).fill_(1.0)
    assert not values.any()


def test_the_order_of_images_is_of_the_runs_seed(small):
    for seed in (0, 3):
        task = Segmentation().open(validate(ImageData, {"source": small}), seed, 3, is_main=True, wait=lambda: None)
        assert task.unit_ids(1, range(3)) == task.corpus.batch(derive(seed, "data"), 1, range(3), 3).units


def mean_loss(task: Any, logits: Tensor) -> float:
    batch = task.batch(0, range(len(logits)), CPU)
    return float(task.loss(Fixed(logits), batch)["loss"].detach()) / batch.counts["loss"]


def labels_of(task: Any, num_images: int = 3) -> Tensor:
    return torch.from_numpy(task.corpus.batch(task._order_seed, 0, range(num_images), num_images).labels)


def test_without_balance_it_is_the_plain_mean_cross_entropy(small):
    task, logits = opened(small), logits_of(3)
    expected = F.cross_entropy(logits, labels_of(task), ignore_index=X)
    assert mean_loss(task, logits) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_with_balance_it_is_torchs_mean_weighted_by_the_median_frequency(small, balance):
    task, logits = opened(small, balance=balance), logits_of(3)
    weights = torch.tensor((np.median(FREQUENCIES) / FREQUENCIES) ** balance, dtype=torch.float32)
    expected = F.cross_entropy(logits, labels_of(task), weight=weights, ignore_index=X)
    assert mean_loss(task, logits) == pytest.approx(float(expected), rel=1e-6)


def test_what_a_step_is_divided_by(small):
    labels = labels_of(opened(small))
    num_of = torch.bincount(labels.flatten(), minlength=3)[:3].double().numpy()
    assert num_of.tolist() == [6, 3, 2]
    for divisor, expected in (("weights", num_of @ (0.5 / FREQUENCIES)), ("pixels", 11)):
        batch = opened(small, balance=1.0, divisor=divisor).batch(0, range(3), CPU)
        assert batch.counts == {"loss": pytest.approx(expected)}
        assert batch.items == 11
    scale = mean_loss(opened(small, balance=1.0, divisor="pixels"), logits_of(3))
    assert scale * 11 == pytest.approx(
        mean_loss(opened(small, balance=1.0), logits_of(3)) * (num_of @ (0.5 / FREQUENCIES))
    )


def test_ignored_pixels_change_neither_loss_nor_gradient(small):
    task, logits = opened(small, balance=1.0), logits_of(3)
    batch = task.batch(0, range(3), CPU)
    ignored = (batch.targets == X)[:, None].expand_as(logits)
    assert ignored.any()
    found = []
    for given in (logits, torch.where(ignored, 50 * logits_of(3, seed=1), logits)):
        model = Fixed(given)
        task.loss(model, batch)["loss"].backward()
        assert model.logits.grad is not None
        found.append(model.logits.grad)
    assert torch.equal(*found)
    assert not found[0][ignored].any()
    assert found[0][~ignored].all()


def test_a_batch_without_labels_has_a_loss_and_a_gradient_of_nothing():
    logits = logits_of(2).requires_grad_()
    loss = weighted_loss(logits, torch.full((2, 2, 2), X), torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_half_precision_is_summed_in_float32():
    logits, labels = logits_of(4, 16, 16).bfloat16(), torch.arange(4 * 256).view(4, 16, 16) % 3
    found = weighted_loss(logits, labels, torch.ones(3))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(F.cross_entropy(logits.double(), labels, reduction="sum")), rel=1e-5)


def test_rows_of_a_step_add_up_to_it_however_they_are_split(small):
    task = opened(small, balance=0.5)
    whole = task.batch(2, range(3), CPU)
    parts = [task.batch(2, range(row, row + 1), CPU) for row in range(3)]
    assert torch.equal(torch.cat([part.inputs["images"] for part in parts]), whole.inputs["images"])
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    for name, total in whole.totals().items():
        assert sum(part.totals()[name] for part in parts) == pytest.approx(total)
    assert len({part.items for part in parts}) > 1
    assert task.unit_ids(2, range(1, 3)) == task.unit_ids(2, range(3))[1:]


@pytest.mark.parametrize("steps", [range(4), (0, 1, 1, 2), (3, 0, 1, 5, 4)], ids=str)
def test_what_was_asked_for_before_changes_no_batch(small, steps):
    task = opened(small)
    for step in steps:
        for rows in (range(2), range(2, 3)):
            found, alone = (one.batch(step, rows, CPU) for one in (task, opened(small)))
            assert torch.equal(found.inputs["images"], alone.inputs["images"])
            assert torch.equal(found.targets, alone.targets)


@pytest.mark.parametrize("row", range(3))
def test_a_rows_labels_are_those_of_its_image(small, row):
    task = opened(small)
    batch = task.batch(0, range(row, row + 1), CPU)
    (unit,) = task.unit_ids(0, range(row, row + 1))
    place = task.corpus.units("train").index(unit)
    assert batch.targets.tolist() == [SMALL["train"][place]]
    assert torch.equal(
        batch.inputs["images"], torch.from_numpy(task.corpus.held_out("train", range(place, place + 1)).images)
    )


def test_the_next_steps_rows_are_read_while_a_step_runs_and_no_others_are_kept(small, monkeypatch):
    task, made = opened(small), []
    make = task._make
    monkeypatch.setattr(task, "_make", lambda step, rows: made.append((step, rows)) or make(step, rows))
    for step in range(3):
        task.batch(step, range(2), CPU)
        task._begun[step + 1, range(2)].result()
    assert sorted(made, key=str) == [(step, range(2)) for step in range(4)]
    assert list(task._begun) == [(3, range(2))]


def test_only_the_main_process_makes_the_cache_and_the_others_wait_for_it(small, tmp_path, monkeypatch):
    facts = opened(small).facts()
    monkeypatch.setenv("LLMEFF_CACHE", str(tmp_path))

    def open_as(is_main, wait):
        return Segmentation().open(validate(ImageData, {"source": small}), 0, 3, is_main=is_main, wait=wait)

    with pytest.raises(ConfigError, match="see the error of the main process"):
        open_as(False, lambda: None)
    assert open_as(False, lambda: open_as(True, lambda: None)).facts() == facts


# -- evaluation


def evaluated(task: Any, model: nn.Module, max_units: int | None = None) -> list[Any]:
    return list(task.evaluate(model, "validation", max_units, CPU, world()))


def test_an_evaluation_by_hand(small):
    """Of two images the first has three labels, and both of class 1 are missed; the second has none."""
    task = opened(small, balance=1.0)
    logits = torch.zeros(2, 3, 2, 2)
    logits[:, 0] = math.log(2)  # class 0 has one half, the others a quarter each
    first, second = evaluated(task, Fixed(logits))
    assert (first.unit, second.unit) == ("validation/00", "validation/01")
    assert first.loss_sum == pytest.approx(math.log(2) + 2 * math.log(4))  # whatever the balance
    assert (first.count, second.count, second.loss_sum) == (3, 0, 0)
    assert first.metrics["predicted.a"] == 3
    assert (first.metrics["correct.a"], first.metrics["labelled.b"], first.metrics["correct.b"]) == (1, 2, 0)
    assert first.metrics["boundary_f1"] == 0
    assert math.isnan(second.metrics["boundary_f1"])
    summary = task.summary([first, second])
    assert summary["loss"] == pytest.approx(first.loss_sum / 3)
    assert summary["global_accuracy"] == 1 / 3
    assert summary["mean_iou"] == (1 / 3 + 0) / 2
    assert set(task.summary([first, second])) >= set(Segmentation.metric_directions)
    assert math.isnan(task.summary([second])["loss"])  # of no pixel there is no mean, and 0 would be the best of all


def street(*settings: str, **fields: Any) -> RunConfig:
    """A small run on drawn scenes, of which a fifth of the outlines' pixels is ignored."""
    data = {
        "task": {"name": "segmentation"} | fields,
        "model": {"name": "segnet-basic", "width": 3},
        "data": {
            "name": "images",
            "source": {
                "name": "scenes", "height": 16, "width": 20, "num_train": 6, "num_search": 0, "num_validation": 5, "num_test": 1,
            },
        },
        "schedule": {"name": "constant"},
        "train": {"steps": 4, "batch": 2},
        "evaluation": {"every": 2, "max_units": 3, "sample_tokens": 0},
        "checkpoint": {"every": 0},
        "runtime": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    return validate(RunConfig, override(data, settings))


def of_this_rank(num_images: int | None, recomputed_norms: int, rows_at_once: int) -> list[Any]:
    """The evaluation of a fresh model, by images of so many at once."""
    from llmeff.tasks import segmentation

    config = street("model.norm=batch_sync", recomputed_norms=recomputed_norms)
    task = config.task.open(config.data, 0, 2, is_main=True, wait=lambda: None)
    torch.manual_seed(0)
    model = task.resolve(config.model).build().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # what another rank has seen
            buffer += (world().rank + 1.0) if name.endswith("mean") else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "_EVAL_PIXELS", rows_at_once * 16 * 20)
        return evaluated(task, model, num_images)


@pytest.mark.parametrize("recomputed_norms", [0, 3])
@pytest.mark.parametrize("num_images", [None, 3, 1])
def test_ranks_that_share_an_evaluation_find_what_one_process_finds(num_images, recomputed_norms):
    expected = of_this_rank(num_images, recomputed_norms, 4)
    assert len(expected) == (num_images or 5)
    for found in ranks(2).run(of_this_rank, num_images, recomputed_norms, 1):
        assert [unit.unit for unit in found] == [unit.unit for unit in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-5)
            assert ours.count == theirs.count
            assert ours.metrics == pytest.approx(theirs.metrics, nan_ok=True)


def test_recomputed_norms_are_averages_over_training_images():
    config = street(recomputed_norms=5)
    task = config.task.open(config.data, 0, 2, is_main=True, wait=lambda: None)
    model = task.resolve(config.model).build().eval()
    evaluated(task, model, 1)
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rows = torch.from_numpy(task.corpus.held_out("train", range(5)).images)
    averaged(model, [*rows.split(2)])
    assert all(torch.equal(buffer, found[name]) for name, buffer in model.named_buffers())
    assert not model.training


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_norms_that_average_nothing_are_not_recomputed(norm):
    words = (
        f"task.recomputed_norms is 5, but model.norm '{norm}' has no statistics over images that could be recomputed"
    )
    with pytest.raises(ConfigError, match=words):
        street(f"model.norm={norm}", "model.norm_groups=1", recomputed_norms=5)


def test_a_split_without_a_label_is_no_judge(tmp_path):
    source = write(tmp_path, SMALL | {"validation": np.full((2, 2, 2), X)})
    with pytest.raises(ConfigError, match="no pixel of the split 'validation' has a label"):
        opened(source).check_split("validation")


def test_the_reference_is_the_likeliest_class_of_each_place(small):
    task = opened(small)
    labels = truth = np.array(SMALL["train"])
    best = 0.0
    for weights in ((1, 1, 1), (0.5 * 11 / 6, 0.5 * 7 / 3, 1)):  # without balance, and with that of median frequencies
        said = np.stack([(labels == label).sum(0) * weights[label] for label in range(3)]).argmax(0)
        counted = truth != X
        told = np.broadcast_to(said, truth.shape)
        ious = []
        for label in range(3):
            both, either = (told == label) & (truth == label), ((told == label) | (truth == label)) & counted
            if either.any():
                ious.append(both.sum() / either.sum())
        best = max(best, float(np.mean(ious)))
    assert 0 < best < 1
    assert task.references("train") == {"location_prior_mean_iou": pytest.approx(best)}
    assert task.references("test") == {}


def test_frequencies_and_weights_are_on_record(small):
    facts = opened(small, balance=1.0).facts()
    assert facts["class_frequencies"] == {"a": 6 / 11, "b": 3 / 7, "c": 2 / 4}
    assert facts["class_weights"] == pytest.approx({"a": 0.5 * 11 / 6, "b": 0.5 * 7 / 3, "c": 1})


def test_the_repeatable_loss_is_the_loss(monkeypatch):
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, :2] = X
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected, each = weighted_loss(logits, labels, weights), pixel_losses(logits, labels)
    assert not each[0, :2].any()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.testing.assert_close(pixel_losses(logits, labels), each)
    found = weighted_loss(logits, labels, weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))
    assert weighted_loss(logits, torch.full_like(labels, X), weights) == 0


def test_facts_of_the_images_are_on_record(small):
    task = opened(small)
    facts = task.facts()
    assert (facts["source"], facts["sha256"]) == ("folder", task.corpus.fingerprint)
    assert facts["class_pixels"] == {"a": 6, "b": 3, "c": 2}
    assert {split: own["num_images"] for split, own in facts["splits"].items()} == {"train": 3, "validation": 2}
    assert (task.item, task.items_per_step) == ("pixel", 3 * 2 * 2)


class ClassOfBrightness(nn.Module):
    """Says class 1 where a picture is bright, and notes how many it is given at once."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(len(images))
        bright = (images.sum(1) > 0).float()
        return torch.stack([1 - bright, bright, torch.full_like(bright, -1.0)], dim=1)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six held-out images, of which each has another number of labels of class 1."""
    labels = np.zeros((6, 2, 4), int)
    for number in range(6):
        labels[number].flat[: number + 1] = 1
    return write(tmp_path_factory.mktemp("six"), {"train": labels[:2], "validation": labels})


def test_so_many_images_are_evaluated_at_once_as_have_the_pixels(six, monkeypatch):
    task, model = opened(six), ClassOfBrightness()
    whole = evaluated(task, model)
    assert model.given == [6]
    assert [result.metrics["labelled.b"] for result in whole] == [1, 2, 3, 4, 5, 6]
    for pixels, batches in ((4 * 8, [4, 2]), (2 * 8 + 7, [2, 2, 2]), (1, [1] * 6)):
        model.given.clear()
        monkeypatch.setattr(segmentation, "_EVAL_PIXELS", pixels)
        assert evaluated(task, model) == whole
        assert model.given == batches
    for few in (1, 4):
        assert evaluated(task, model, few) == whole[:few]
    assert evaluated(task, model, 7) == whole


def test_as_many_images_are_evaluated_at_once_as_have_a_quarter_of_a_million_pixels(tmp_path):
    """Of 256 by 256 pixels, four."""
    labels = np.zeros((5, 256, 256), int)
    labels[:, 0] = 1
    task, model = opened(write(tmp_path, {"train": labels[:1], "validation": labels})), ClassOfBrightness()
    evaluated(task, model)
    assert model.given == [4, 1]


def test_nothing_is_kept_for_a_backward_pass_that_never_comes(six):
    task, model, kept = opened(six), nn.Conv2d(3, 3, 1), []
    model.register_forward_hook(lambda model, given, logits: kept.append(logits.requires_grad))
    evaluated(task, model)
    assert task.sample(model, "validation", 0, CPU).picture is not None
    assert kept == [False] * 5  # all images at once, and the four that are shown


@pytest.mark.parametrize(("most", "shown"), [(4, [0, 1, 3, 4]), (2, [0, 3]), (7, [0, 1, 2, 3, 4, 5])])
def test_what_people_see_are_images_evenly_apart_with_truth_and_prediction(six, monkeypatch, most, shown):
    seen = []
    monkeypatch.setattr(segmentation, "_NUM_SHOWN", most)
    monkeypatch.setattr(segmentation, "panel", lambda *given: seen.append(given) or given)
    monkeypatch.setattr(segmentation, "png", lambda made: b"picture of " + repr(len(made[0])).encode())
    task, model = opened(six), ClassOfBrightness()
    assert task.sample(model, "validation", 0, CPU).picture == f"picture of {len(shown)}".encode()
    ((rows, headings, classes),) = seen
    assert (headings, tuple(classes)) == (["image", "truth", "predicted"], ("a", "b", "c"))
    for row, place in zip(rows, shown, strict=True):
        truth, predicted = row.labels
        assert truth.tolist() == np.r_[np.ones(place + 1), np.zeros(7 - place)].reshape(2, 4).tolist()
        images = torch.from_numpy(task.corpus.held_out("validation", range(place, place + 1)).images)
        assert predicted.tolist() == (images.sum(1) > 0)[0].int().tolist()
        assert np.array_equal(row.pixels, task.corpus.as_stored("validation")[place])


# -- through the loop


def test_the_record_of_a_run_is_complete(tmp_path):
    result = train(street("model.width=8", balance=0.5), tmp_path / "run")  # of fewer channels, kernels fill up blocks
    run = read_run(tmp_path / "run")
    assert run.result == result
    assert (result.item, result.status) == ("pixel", "finished")
    assert result.error["parameters"] == result.error["executed_flops"] == 0
    assert result.error["saved_bytes"] == pytest.approx(0, abs=1e-3)  # the classes' weights are kept too
    if "peak_bytes" in result.error:  # it is left out where the workspace of convolutions is unknown
        assert result.error["peak_bytes"] == pytest.approx(0, abs=0.05)
    assert set(result.metric_directions) <= set(result.metrics["validation"])
    assert (run.steps["items"] < 2 * 16 * 20).all()
    assert [(row.step, row.split) for row in run.evaluations] == [(2, "validation"), (4, "validation")]
    last = [row for row in run.evals.to_pylist() if row["step"] == 4]
    loss = sum(row["loss_sum"] for row in last) / sum(row["count"] for row in last)
    assert len(last) == 5
    assert result.metrics["validation"]["loss"] == pytest.approx(loss)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["num_classes"] == 11


def test_a_step_in_which_nothing_is_labelled_moves_nothing(tmp_path):
    """One training image of three has no labels, and so has a held-out one: steps of one image are 0, not NaN."""
    mask = np.arange(3 * 16 * 16).reshape(3, 16, 16) % 3
    mask[1] = X
    source = write(tmp_path, {"train": mask, "validation": mask})
    settings = street("train.steps=6", "train.batch=1", "optim=sgd", "optim.momentum=0.0", balance=1.0)
    config = validate(RunConfig, settings.model_dump(mode="json") | {"data": {"name": "images", "source": source}})
    result = train(config, tmp_path / "run")
    steps = read_run(tmp_path / "run").steps
    empty = (steps["loss"] == 0).tolist()
    assert sum(empty) == 2  # once an epoch
    assert [norm == 0 for norm in steps["grad_norm"].tolist()] == empty
    assert [number <= 1 for number in steps["items"].tolist()] == empty
    assert all(map(math.isfinite, [result.metrics["validation"][name] for name in ("loss", "mean_iou")]))


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_any_split_into_micro_batches_gives_the_same_losses(tmp_path, norm):
    rows = {}
    for size in (4, 2, 1):
        fixed = ("model.width=4", "model.norm_groups=2", "train.batch=4", "model.connection=add")
        train(street(f"model.norm={norm}", f"train.micro_batch={size}", *fixed, balance=0.5), tmp_path / str(size))
        rows[size] = read_run(tmp_path / str(size)).steps
    for size in (2, 1):
        for name in ("loss", "grad_norm"):
            assert rows[size][name] == pytest.approx(rows[4][name], rel=1e-5), (size, name)


def test_recomputation_changes_no_loss_and_no_running_statistic(tmp_path):
    found = []
    for name, recompute in (("plain", "false"), ("again", "true")):
        train(street(f"runtime.recompute={recompute}"), tmp_path / name)
        run = read_run(tmp_path / name)
        found.append((run.steps["loss"].tolist(), run.evals))
    assert found[0][0] == found[1][0]
    assert found[0][1].equals(found[1][1])


# -- what does not fit


def test_what_is_no_model_of_images_or_no_images_is_refused():
    with pytest.raises(ConfigError) as raised:
        validate(RunConfig, {"task": "segmentation", "model": DecoderConfig(), "data": TextData()})
    text = str(raised.value)
    assert "task 'segmentation' needs an image model, but model 'decoder' is not one" in text
    assert "task 'segmentation' needs images, but data 'text' provides none" in text


def test_classes_are_the_datas():
    assert Segmentation().infer_model(SegNetBasic(), ImageData()).num_classes == 11
    with pytest.raises(ConfigError, match=r"model.num_classes is 5, but the data have 11 classes. Set it to 'auto'"):
        Segmentation().infer_model(SegNetBasic(num_classes=5), ImageData())


def test_images_that_a_model_cannot_pool_are_refused_before_anything_is_written(tmp_path):
    config = street("model.name=segnet", "model.width=2")
    assert isinstance(config.model, SegNetVGG)
    with pytest.raises(ConfigError, match=r"at least 32 pixels a side, but these have 16 x 20"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"balance": -0.5}, "balance"), ({"divisor": "images"}, "divisor"), ({"boundary_tolerance": 1.0}, "boundary_tol")],
)
def test_settings_that_mean_nothing(fields, said):
    with pytest.raises(ConfigError, match=said):
        validate(Segmentation, fields)
