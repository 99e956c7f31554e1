import io

import numpy as np
import pytest
from PIL import Image

from llmeff.core.ignored import IGNORED_PIXEL
from llmeff.data import pictures
from llmeff.data.image_folder import ImageFolder
from llmeff.data.pictures import CELL, OPACITY, Shown, coloured, mask, overlay, palette, panel, png, seen

H, W = 12, 16
LABELS = (np.arange(H * W).reshape(H, W) % 5).astype(np.uint8)
LABELS[0] = IGNORED_PIXEL
IMAGE = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
NAMES = ["sky", "a long name of a class", "$road$", "_car", "дорога"]


class TestPalette:
    def test_every_label_has_a_colour_of_its_own(self):
        assert palette().shape == (256, 3)
        assert len(np.unique(palette(), axis=0)) == 256

    @pytest.mark.parametrize(("num_classes", "least"), [(5, 0.1), (11, 0.1), (19, 0.07), (40, 0.04)])
    def test_classes_are_told_apart_whatever_cones_one_has(self, num_classes, least):
        places = seen(np.concatenate([palette()[:num_classes], palette()[IGNORED_PIXEL:]]))
        distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
        assert distances[~np.eye(len(places), dtype=bool)].min() > least  # 0.02 is just noticed

    def test_distances_are_those_of_oklab(self):
        # Ottosson's own values of white, and of pure red and blue
        places = seen(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]]))[:, 0]
        expected = [[1, 0, 0], [0.628, 0.225, 0.126], [0.452, -0.032, -0.312]]
        np.testing.assert_allclose(places, expected, atol=1e-3)

    def test_grey_is_grey_to_everyone(self):
        np.testing.assert_allclose(seen(np.array([[128, 128, 128]]))[0, :, 1:], 0, atol=1e-3)


class TestMask:
    def test_numbers_are_read_back_by_any_reader_and_colours_are_shown(self, tmp_path):
        (tmp_path / "images").mkdir()
        Image.fromarray(IMAGE).save(tmp_path / "images" / "a.png")
        (tmp_path / "masks").mkdir()
        (tmp_path / "masks" / "a.png").write_bytes(png(mask(LABELS)))
        folder = ImageFolder(path=str(tmp_path / "images"), masks=str(tmp_path / "masks"), class_names=tuple("abcde"))
        ((_, labels),) = (image.read() for image in folder.images())
        assert np.array_equal(labels, LABELS)
        with Image.open(tmp_path / "masks" / "a.png") as shown:
            assert np.array_equal(np.asarray(shown.convert("RGB")), coloured(LABELS))

    def test_an_overlay_lies_between_the_image_and_the_colours(self):
        mixed = overlay(IMAGE, LABELS).astype(float)
        np.testing.assert_allclose(mixed, (1 - OPACITY) * IMAGE + OPACITY * coloured(LABELS), atol=0.51)


def panel_of(labels, *, pixels=IMAGE, captions=("image", "truth", "a"), names=NAMES):
    return np.asarray(panel([Shown(pixels=pixels, labels=labels)], captions, names))


class TestPanel:
    def test_small_images_grow_by_whole_pixels(self):
        drawn = panel_of([LABELS, LABELS])
        factor = CELL // W
        tall = np.asarray(Image.fromarray(coloured(LABELS)).resize((W * factor, H * factor), Image.Resampling.NEAREST))
        places = [
            left for left in range(drawn.shape[1] - CELL + 1)
            if any(np.array_equal(drawn[top : top + H * factor, left : left + CELL], tall) for top in range(40, 70))
        ]  # fmt: skip
        assert len(places) == 2

    @pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (700, 500), (1500, 4000)])
    def test_any_size_fits(self, size):
        labels = np.zeros(size, np.uint8)
        drawn = panel_of([labels], pixels=np.zeros((*size, 3), np.uint8), captions=("image", "a"))
        assert max(drawn.shape[:2]) <= 4 * CELL + 200

    def test_the_legend_names_what_occurs(self, monkeypatch):
        drawn = []
        fitted = pictures._fitted
        monkeypatch.setattr(pictures, "_fitted", lambda text, *rest: drawn.append(text) or fitted(text, *rest))
        labels = np.where(LABELS == 1, 2, LABELS).astype(np.uint8)
        panel_of([labels, np.zeros_like(LABELS)])
        assert set(drawn) == {"image", "truth", "a", "sky", "$road$", "_car", "дорога", "no label"}

    def test_a_long_caption_is_cut_to_its_column(self):
        font = pictures._font(20)
        cut = pictures._fitted("a very long name of a run", 100, font)
        assert cut.endswith("…")
        assert font.getlength(cut) <= 100
        assert pictures._fitted("short", 100, font) == "short"
        assert pictures._fitted("short", font.getlength("short"), font) == "short"

    def test_captions_and_legend_are_written_in_letters_of_one_size(self):
        def height(part):
            """Of the dark pixels."""
            rows = np.flatnonzero((part < 60).all(axis=-1).any(axis=1))
            return rows[-1] - rows[0] + 1

        drawn = panel_of([np.zeros_like(LABELS)], captions=("III", "III"), names=["III"])
        caption, name = height(drawn[:50]), height(drawn[-50:])
        assert abs(caption - name) <= 1
        assert caption >= 0.7 * 26

    def test_many_classes_have_a_legend_of_many_lines(self):
        labels = np.arange(H * W).reshape(H, W).astype(np.uint8)
        names = [f"class {number}" for number in range(H * W)]
        few, many = panel_of([LABELS]), panel_of([labels], names=names)
        assert many.shape[1] == few.shape[1]
        assert many.shape[0] > few.shape[0]


def test_a_png_is_a_file():
    with Image.open(io.BytesIO(png(IMAGE))) as image:
        assert np.array_equal(np.asarray(image), IMAGE)
