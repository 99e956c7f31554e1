"""Pictures through trained models: what is written is what the model says, and wrong input is one error and no file."""

import errno
import json
import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import llmeff.lab.pictures as module
from llmeff.cli import main
from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, override, validate
from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import cityscapes
from llmeff.data.pictures import OPACITY, coloured
from llmeff.lab.pictures import segment
from llmeff.models.image_model import load_image_model
from llmeff.record.reader import read_run
from llmeff.run.loop import train
from llmeff.tasks.image_metrics import confusion

H, W = 32, 48
SMALL = {
    "task": {"name": "segmentation"},
    "model": {"name": "segnet-basic", "width": 8, "norm": "group"},
    "data": {
        "name": "images",
        "source": {
            "name": "scenes", "height": H, "width": W, "num_train": 8, "num_search": 0, "num_validation": 5,
            "num_test": 0,
        },
    },
    "schedule": {"name": "constant"},
    "train": {"steps": 4, "batch": 2},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 0},
    "runtime": {"device": "cpu", "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their seeds."""
    folder = tmp_path_factory.mktemp("segment")
    for name, seed in (("a", 0), ("b", 1)):
        train(validate(RunConfig, override(SMALL, [f"seed={seed}"])), folder / name)
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A run of one's own."""
    shutil.copytree(runs / "a", tmp_path / "run")
    return tmp_path / "run"


def picture(path, size=(H, W), seed=0):
    """A file with a picture of soft colours, which no format changes much."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def truth(path, size=(H, W), seed=0):
    labels = np.random.default_rng(seed).integers(0, 11, size, dtype=np.uint8)
    labels[0, :3] = IGNORED_PIXEL
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return labels


def said(run, path):
    """What the model of a run says of a picture, written out."""
    model, preparation = load_image_model(run / "model")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    is_smaller = preparation.size[0] <= height and preparation.size[1] <= width
    kind = Image.Resampling.BOX if is_smaller else Image.Resampling.BILINEAR
    brought = np.asarray(Image.fromarray(pixels).resize(preparation.size[::-1], kind)) / 255
    given = (brought - np.array(preparation.mean)) / np.array(preparation.std)
    with torch.no_grad():
        logits = model(torch.tensor(given, dtype=torch.float32).permute(2, 0, 1)[None])
        return F.interpolate(logits, (height, width), mode="bilinear").argmax(1)[0].numpy()


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image), image.mode


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "size"),
    [("p.png", (H, W)), ("p.jpg", (70, 50)), ("p.webp", (20, 30)), ("p.bmp", (40, 90)), ("p.tif", (31, 49))],
)
def test_a_mask_is_what_the_model_says_at_the_pictures_own_size(runs, tmp_path, name, size):
    path = picture(tmp_path / name, size)
    assert segment(runs / "a", [path], tmp_path / "out") == f"1 picture in {tmp_path / 'out'}"
    assert listing(tmp_path / "out") == ["p.mask.png", "p.overlay.png"]
    (labels, mode), (mixed, _) = (opened(tmp_path / "out" / f"p.{kind}.png") for kind in ("mask", "overlay"))
    assert mode == "P"
    assert labels.shape == size
    assert np.mean(labels == said(runs / "a", path)) > 0.999  # but for rounding
    with Image.open(path) as image:
        expected = (1 - OPACITY) * np.asarray(image.convert("RGB")) + OPACITY * coloured(labels)
    np.testing.assert_allclose(mixed, expected, atol=1)


@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_made_goes_where_a_link_of_the_users_leads_to(runs, tmp_path, is_there):
    if is_there:
        (tmp_path / "storage").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "storage")
    segment(runs / "a", [picture(tmp_path / "p.png")], tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert listing(tmp_path / "storage") == ["p.mask.png", "p.overlay.png"]


def test_folders_are_searched_and_keep_their_order_below_each_other(runs, tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    segment(runs / "a", [tmp_path / "in", picture(tmp_path / "single.png")], tmp_path / "out")
    masks = [name for name in listing(tmp_path / "out") if name.endswith(".mask.png")]
    assert masks == ["a.mask.png", "b.mask.png", "deep/c.mask.png", "single.mask.png"]


@pytest.fixture
def panels(monkeypatch):
    """What each panel is made of."""
    found = []
    panel = module.panel
    monkeypatch.setattr(module, "panel", lambda *given: found.append(given) or panel(*given))
    return found


def test_panels_set_the_truth_and_other_runs_beside_it(runs, tmp_path, panels):
    path = picture(tmp_path / "p.png")
    labels = truth(tmp_path / "masks" / "p.png")
    segment(runs / "a", [path], tmp_path / "out", masks=tmp_path / "masks", beside=[runs / "b"])
    (((row,), captions, _),) = panels
    assert captions == ["image", "truth", "a", "b"]
    assert np.array_equal(row.labels[0], labels)
    assert np.array_equal(row.labels[1], opened(tmp_path / "out" / "p.mask.png")[0])
    assert np.mean(row.labels[2] == said(runs / "b", path)) > 0.999
    assert listing(tmp_path / "out") == [
        "classes.png", "p.mask.png", "p.overlay.png", "p.panel.png", "scores.json",
    ]  # fmt: skip


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, run, tmp_path, panels):
    again = run.rename(tmp_path / "a")
    segment(runs / "a", [picture(tmp_path / "p.png")], tmp_path / "out", beside=[again])
    assert panels[0][1] == ["image", str(runs / "a"), str(again)]


def test_scores_are_of_the_pictures_own_pixels(runs, tmp_path):
    paths = [picture(tmp_path / "in" / f"{n}.png", size, n) for n, size in enumerate([(H, W), (50, 40)])]
    truths = [truth(tmp_path / "masks" / path.name, opened(path)[0].shape[:2], n) for n, path in enumerate(paths)]
    text = segment(runs / "a", paths, tmp_path / "out", masks=tmp_path / "masks", beside=[runs / "b"])
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["scored"] == "2 pictures, each at its own size"
    for name in ("a", "b"):
        matrix = sum(
            confusion(said(runs / name, path), own, 11) for path, own in zip(paths, truths, strict=True)
        )  # fmt: skip
        iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
        found = written["runs"][name]
        assert found["global_accuracy"] == pytest.approx(matrix.trace() / matrix.sum(), rel=1e-2)
        assert found["mean_iou"] == pytest.approx(iou.mean(), rel=2e-2)
        assert [value for key, value in found.items() if key.startswith("iou.")] == pytest.approx(iou, abs=1e-2)
    assert "boundary F1" in text
    assert "IoU of signsymbol" in text


def test_what_a_model_says_is_perfect_where_it_is_the_truth(runs, tmp_path):
    path = picture(tmp_path / "p.png", (60, 60))
    segment(runs / "a", [path], tmp_path / "first")
    (tmp_path / "masks").mkdir()
    shutil.copy(tmp_path / "first" / "p.mask.png", tmp_path / "masks" / "p.png")
    segment(runs / "a", [path], tmp_path / "out", masks=tmp_path / "masks")
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["runs"]["a"]
    assert found["mean_iou"] == found["global_accuracy"] == found["class_accuracy"] == 1
    absent = {key for key, value in found.items() if value is None}
    assert absent == {key for key in found if key.startswith("iou.") and found[key] != 1} | (absent & {"boundary_f1"})


def changed(folder, part, **changes):
    path = folder / part
    content = json.loads(path.read_text())
    for key, value in changes.items():
        place = content
        *above, last = key.split("__")
        for name in above:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(content))


def test_masks_are_read_as_the_runs_source_reads_them(run, tmp_path):
    folder = {
        "name": "folder", "path": "nowhere", "masks": "nowhere", "ignored": 77,
        "class_names": list(load_image_model(run / "model")[1].classes),
    }  # fmt: skip
    changed(run, "config.json", data__source=folder)
    path = picture(tmp_path / "p.png")
    labels = truth(tmp_path / "masks" / "p.png")
    words = r"contains values that are not classes: 255 \(3 pixels\)\. Allowed: 0 to 10, 77"
    with pytest.raises(ConfigError, match=words):
        segment(run, [path], tmp_path / "out", masks=tmp_path / "masks")
    Image.fromarray(np.where(labels == IGNORED_PIXEL, 77, labels).astype(np.uint8)).save(tmp_path / "masks" / "p.png")
    segment(run, [path], tmp_path / "out", masks=tmp_path / "masks")
    assert (tmp_path / "out" / "scores.json").is_file()


def test_masks_have_their_names_in_the_runs_source(run, tmp_path):
    changed(run, "config.json", data__source={"name": "cityscapes", "path": "nowhere"})
    path = picture(tmp_path / "p" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    labels = truth(tmp_path / "masks" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png")
    ids = np.where(labels == IGNORED_PIXEL, 0, np.array([*cityscapes.CLASSES])[labels % 11]).astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "masks" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png")
    truth(tmp_path / "masks" / "ulm" / "ulm_000000_000019_gtFine_instanceIds.png")
    segment(run, [path.parent.parent], tmp_path / "out", masks=tmp_path / "masks")
    assert (tmp_path / "out" / "ulm" / "ulm_000000_000019_leftImg8bit.panel.png").is_file()
    assert (tmp_path / "out" / "scores.json").is_file()


# -- what is wrong


def no_run(run, given):
    shutil.rmtree(run)


def unfinished(run, given):
    for name in ("result.json", "samples.png", "loss.png"):
        (run / name).unlink()
    shutil.rmtree(run / "model")


def of_words(run, given):
    (run / "config.json").write_text(RunConfig().model_dump_json())


def without_weights(run, given):
    (run / "model" / "model.safetensors").unlink()


def other_classes(run, given):
    other = shutil.copytree(run, run.with_name("other"))
    names = list(load_image_model(run / "model")[1].classes)
    changed(other, "model/config.json", preparation__classes=["water", *names[1:]])
    given["beside"] = [other]


def twice(run, given):
    given["beside"] = [run]


def none_there(run, given):
    given["images"] = [run.with_name("nowhere.png")]


def no_pictures(run, given):
    shutil.rmtree(given["images"][0])
    given["images"][0].mkdir()


def no_picture(run, given):
    (given["images"][0] / "p.png").write_text("hello")


def truncated(run, given):
    path = given["images"][0] / "p.png"
    path.write_bytes(path.read_bytes()[:-40])


def deep(run, given):
    Image.fromarray(np.full((H, W), 1000, np.uint16)).save(given["images"][0] / "p.png")


def two_of_a_name(run, given):
    given["images"].append(picture(run.with_name("more") / "p.jpg"))


def no_masks(run, given):
    given["masks"] = run.with_name("nowhere")


def a_mask_too_few(run, given):
    truth(run.with_name("masks") / "p.png")
    given["masks"] = run.with_name("masks")


def a_mask_of_another_size(run, given):
    truth(run.with_name("masks") / "p.png", (H, W + 1))
    truth(run.with_name("masks") / "q.png")
    given["masks"] = run.with_name("masks")


def a_mask_in_colours(run, given):
    picture(run.with_name("masks") / "p.png")
    truth(run.with_name("masks") / "q.png")
    given["masks"] = run.with_name("masks")


def occupied(run, given):
    given["out"].mkdir()
    (given["out"] / "thesis.tex").write_text("x")


def a_file(run, given):
    given["out"].write_text("x")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_run, ["run: there is no such folder"]),
        (unfinished, ["run: the run is unfinished at step 4 and has no model", "checkpoints, config.json, env.json"]),
        (of_words, ["this run's task is 'causal_lm', but this command needs a segmentation run"]),
        (without_weights, ["model.safetensors: cannot be loaded"]),
        (other_classes, ["other: has the classes water, building", "but ", "run has sky, building"]),
        (twice, ["the same run is given twice", "run"]),
        (none_there, ["IMAGES: ", "nowhere.png does not exist"]),
        (no_pictures, ["IMAGES: no file below ", "in ends in .png"]),
        (no_picture, ["p.png: is not an image"]),
        (truncated, ["p.png: cannot be read as an image"]),
        (deep, ["p.png: has more than 8 bits per channel"]),
        (
            two_of_a_name,
            [
                "p.jpg: has the same name as ",
                "p.png, so their results would overwrite one another. Rename one of the two files",
            ],
        ),
        (no_masks, ["--masks: there is no folder "]),
        (a_mask_too_few, ["there is no mask for ", "q.png. A mask must have the name of its picture"]),
        (a_mask_of_another_size, ["masks/p.png: is 49 pixels wide and 32 high, but "]),
        (a_mask_in_colours, ["masks/p.png: has the mode 'RGB', but a mask needs one channel of class ids"]),
        (occupied, ["out: already exists and is not an empty folder. Nothing is overwritten"]),
        (a_file, ["out: already exists and is not an empty folder. Nothing is overwritten"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_input_is_one_error_before_anything_is_written(capsys, run, tmp_path, spoil, words):
    given = {"images": [tmp_path / "in"], "masks": None, "beside": [], "out": tmp_path / "out"}
    for name in ("p.png", "q.png"):
        picture(tmp_path / "in" / name)
    spoil(run, given)
    before = listing(tmp_path)
    options = ["--masks", given["masks"]] if given["masks"] else []
    options += ["--beside", *given["beside"]] if given["beside"] else []
    assert main(list(map(str, ["segment", run, *given["images"], "-o", given["out"], *options]))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llmeff: error:")
    for word in words:
        assert word in captured.err
    assert listing(tmp_path) == before


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch):
    path, out = picture(tmp_path / "p.png"), tmp_path / "out"

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_draw", full)
    with pytest.raises(ConfigError, match=r"out: cannot be written \(No space left on device\)"):
        segment(runs / "a", [path], out)
    assert listing(tmp_path) == ["p.png"]


def test_the_command_says_what_it_made(capsys, runs, tmp_path):
    picture(tmp_path / "in" / "p.png")
    truth(tmp_path / "masks" / "p.png")
    (tmp_path / "out").mkdir()  # an empty one is as good as none
    command = ["segment", runs / "a", tmp_path / "in", "-o", tmp_path / "out", "--masks", tmp_path / "masks"]
    assert main(list(map(str, command))) == 0
    out = capsys.readouterr().out
    assert "1 picture, each at its own size" in out
    assert "mean IoU" in out
    assert out.endswith(f"1 picture in {tmp_path / 'out'}\n")


# -- at the end of a run


def test_a_run_leaves_a_picture_of_held_out_images(runs):
    with Image.open(runs / "a" / "samples.png") as image:
        assert image.width > 3 * W
    assert read_run(runs / "a").result.sample is None


def test_no_samples_where_none_are_asked_for(tmp_path):
    train(validate(RunConfig, override(SMALL, ["evaluation.sample_tokens=0", "train.steps=1"])), tmp_path / "run")
    assert not (tmp_path / "run" / "samples.png").exists()


def test_the_pictures_of_the_guide_are_described_as_they_can_be():
    guide = (Path(__file__).parents[2] / "GUIDE.md").read_text(encoding="utf-8")
    block = guide.partition("# photos.toml")[2].partition("```")[0].partition("\n")[2]
    config = validate(RunConfig, tomllib.loads(block))
    assert (config.task.name, config.model.name, config.data.source.name) == ("segmentation", "segnet", "folder")
