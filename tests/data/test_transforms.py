import os
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from gan.data.normalise import to_8bit
from gan.data.sources import open_source
from gan.data.transforms import (
    TRANSFORMS,
    center_crop,
    center_crop_wide,
    enlargement,
    fit,
    is_too_small,
    make_transform,
    output_size,
    stretch,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dataset_clothing64.npz"
BOX = Image.Resampling.BOX


@pytest.mark.skipif("GAN_TEST_DATA" not in os.environ, reason="GAN_TEST_DATA names no folder of photographs")
def test_center_crop_equals_the_golden_images():
    golden = np.load(GOLDEN)
    source = open_source(str(Path(os.environ["GAN_TEST_DATA"]) / "clothing-photos.zip"))
    assert source.names[:40] == list(golden["sources"])
    transform = make_transform("center-crop", (64, 64), "lanczos")
    for index, expected in enumerate(golden["images"]):
        image = transform(to_8bit(source.read(index), "RGB"))
        assert np.abs(image.astype(int) - expected).mean() < 1.0, source.names[index]  # JPEG decoders differ


def test_none_without_a_size_leaves_pixels_as_they_are():
    pixels = noise(5, 7, 3)
    assert (make_transform("none", None)(Image.fromarray(pixels)) == pixels).all()


def test_stretch_scales_the_whole_image_as_none_does_with_a_size():
    pixels = noise(4, 8, 3)
    scaled = np.asarray(stretch(Image.fromarray(pixels), (4, 4), BOX))
    assert np.abs(scaled - pixels.reshape(4, 4, 2, 3).mean(axis=2)).max() <= 1
    for name in ("none", "stretch"):
        assert (make_transform(name, (4, 4), "box")(Image.fromarray(pixels)) == scaled).all()


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (6, 4, slice(1, 5), slice(0, 4)),
        (4, 6, slice(0, 4), slice(1, 5)),
        (7, 4, slice(1, 5), slice(0, 4)),  # an odd margin is larger at the end
        (4, 7, slice(0, 4), slice(1, 5)),
        (4, 4, slice(0, 4), slice(0, 4)),
    ],
)
def test_center_crop_takes_the_centred_square(height, width, rows, columns):
    pixels = noise(height, width, 3)
    assert (np.asarray(center_crop(Image.fromarray(pixels), (4, 4))) == pixels[rows, columns]).all()


def test_center_crop_to_other_proportions_does_not_distort():
    pixels = noise(8, 8, 3)
    assert (np.asarray(center_crop(Image.fromarray(pixels), (8, 4))) == pixels[2:6]).all()
    assert (np.asarray(center_crop(Image.fromarray(pixels), (4, 8))) == pixels[:, 2:6]).all()


def test_center_crop_scales_with_the_chosen_filter():
    pixels = noise(10, 8, 3)
    halved = np.asarray(make_transform("center-crop", (4, 4), "box")(Image.fromarray(pixels)))
    assert np.abs(halved - pixels[1:9].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))).max() <= 1
    lanczos = np.asarray(make_transform("center-crop", (4, 4), "lanczos")(Image.fromarray(pixels)))
    assert (lanczos != halved).any()


def test_center_crop_of_extreme_shapes_stays_inside_the_image():
    for width, height in ((1, 300), (300, 1), (1, 1)):
        assert center_crop(Image.new("RGB", (width, height)), (8, 4)).size == (8, 4)


def test_center_crop_wide_pads_to_a_black_square():
    pixels = noise(10, 8, 3)
    wide = np.asarray(center_crop_wide(Image.fromarray(pixels), (8, 6)))
    assert wide.shape == (8, 8, 3)
    assert (wide[1:7] == pixels[2:8]).all()
    assert (wide[[0, 7]] == 0).all()
    assert output_size("center-crop-wide", (8, 6)) == (8, 8)


def test_center_crop_wide_leaves_out_what_it_would_enlarge():
    assert not is_too_small("center-crop-wide", (8, 6), (8, 6))
    assert is_too_small("center-crop-wide", (7, 9), (8, 6))
    assert is_too_small("center-crop-wide", (9, 5), (8, 6))
    assert not is_too_small("center-crop", (1, 1), (8, 8))


def test_fit_shows_the_whole_picture_in_the_middle_of_the_background():
    pixels = noise(4, 8, 3)
    for size, rows, columns in (
        ((8, 9), slice(2, 6), slice(0, 8)),  # an odd border is larger at the end
        ((11, 4), slice(0, 4), slice(1, 9)),
        ((8, 4), slice(0, 4), slice(0, 8)),
    ):
        fitted = make_transform("fit", size, background=(10, 20, 30))(Image.fromarray(pixels))
        assert fitted.shape == (size[1], size[0], 3)
        assert (fitted[rows, columns] == pixels).all()
        border = np.ones(fitted.shape[:2], dtype=bool)
        border[rows, columns] = False
        assert (fitted[border] == (10, 20, 30)).all()


def test_fit_scales_with_the_chosen_filter_and_without_distortion():
    pixels = noise(8, 16, 3)
    fitted = make_transform("fit", (8, 8), "box")(Image.fromarray(pixels))
    assert np.abs(fitted[2:6] - pixels.reshape(4, 2, 8, 2, 3).mean(axis=(1, 3))).max() <= 1


def test_the_border_is_grey_in_grey_and_transparent_in_rgba():
    grey = make_transform("fit", (2, 4), background=(255, 0, 0))(Image.new("L", (2, 2), 9))
    assert grey.tolist() == [[76, 76], [9, 9], [9, 9], [76, 76]]  # luma of red
    clear = make_transform("fit", (2, 4), background=(255, 0, 0))(Image.new("RGBA", (2, 2), (1, 2, 3, 255)))
    assert clear[[0, 3]].tolist() == 2 * [2 * [[255, 0, 0, 0]]]
    assert clear[[1, 2]].tolist() == 2 * [2 * [[1, 2, 3, 255]]]


def test_fit_keeps_a_pixel_of_a_strip():
    for image_size, inner in (((20000, 10), (64, 1)), ((10, 20000), (1, 64)), ((1, 1), (64, 64))):
        fitted = np.asarray(fit(Image.new("RGB", image_size, (0, 0, 0)), (64, 64)))
        assert (fitted == 0).all(axis=2).sum() == inner[0] * inner[1]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("image_size", [(1, 1), (20000, 10), (10, 20000), (97, 64), (96, 64)])
def test_every_transform_makes_the_size_of_every_image(name, image_size):
    for mode, shape in (("L", ()), ("RGB", (3,)), ("RGBA", (4,))):
        width, height = output_size(name, (96, 64))
        pixels = make_transform(name, (96, 64))(Image.new(mode, image_size))
        assert (pixels.shape, pixels.dtype) == ((height, width, *shape), np.uint8)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_hidden_colours_do_not_come_through(name):
    red_on_green = np.zeros((40, 60, 4), dtype=np.uint8)
    red_on_green[:] = (0, 255, 0, 0)
    red_on_green[10:30, 15:45] = (255, 0, 0, 255)
    image = to_8bit(Image.fromarray(red_on_green), "RGBA", (0, 0, 255))
    pixels = make_transform(name, (24, 16), background=(0, 0, 255))(image)
    clear = pixels[..., 3] == 0
    assert clear.any()
    assert (pixels[clear] == (0, 0, 255, 0)).all()
    assert (pixels[~clear][:, :3] == (255, 0, 0)).all()  # colours are weighted by alpha: edges take nothing of the blue
    assert (pixels[..., 3] == 255).any()


def test_by_how_much_images_are_enlarged():
    assert enlargement("stretch", (100, 50), (50, 100)) == 2
    assert enlargement("none", (100, 50), (50, 25)) == 0.5
    assert enlargement("center-crop", (400, 100), (200, 200)) == 2
    assert enlargement("center-crop", (300, 200), (96, 64)) == 64 / 200
    assert enlargement("center-crop", (96, 64), (96, 64)) == 1
    assert enlargement("fit", (400, 100), (200, 200)) == 0.5
    assert enlargement("fit", (20, 10), (200, 200)) == 10
    assert enlargement("center-crop-wide", (8, 6), (16, 12)) == 2
