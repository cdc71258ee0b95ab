import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gan.data.sources import open_source
from gan.data.transforms import (
    center_crop,
    center_crop_wide,
    is_grey,
    is_too_small,
    make_transform,
    output_size,
    scale,
    to_8bit,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dataset_clothing64.npz"
OPTIONS = {"webp": {"lossless": True}}
BOX = Image.Resampling.BOX


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


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
    pixels = noise(5, 7)
    assert (make_transform("none", None)(Image.fromarray(pixels)) == pixels).all()


def test_none_scales_the_whole_image():
    pixels = noise(4, 8)
    scaled = np.asarray(scale(Image.fromarray(pixels), (4, 4), BOX))
    assert np.abs(scaled - pixels.reshape(4, 4, 2, 3).mean(axis=2)).max() <= 1


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
    pixels = noise(height, width)
    assert (np.asarray(center_crop(Image.fromarray(pixels), (4, 4))) == pixels[rows, columns]).all()


def test_center_crop_to_other_proportions_does_not_distort():
    pixels = noise(8, 8)
    assert (np.asarray(center_crop(Image.fromarray(pixels), (8, 4))) == pixels[2:6]).all()
    assert (np.asarray(center_crop(Image.fromarray(pixels), (4, 8))) == pixels[:, 2:6]).all()


def test_center_crop_scales_with_the_chosen_filter():
    pixels = noise(10, 8)
    halved = np.asarray(make_transform("center-crop", (4, 4), "box")(Image.fromarray(pixels)))
    assert np.abs(halved - pixels[1:9].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))).max() <= 1
    lanczos = np.asarray(make_transform("center-crop", (4, 4), "lanczos")(Image.fromarray(pixels)))
    assert (lanczos != halved).any()


def test_center_crop_of_extreme_shapes_stays_inside_the_image():
    for width, height in ((1, 300), (300, 1), (1, 1)):
        assert center_crop(Image.new("RGB", (width, height)), (8, 4)).size == (8, 4)


def test_center_crop_wide_pads_to_a_black_square():
    pixels = noise(10, 8)
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


def as_8bit(image, mode):
    result = to_8bit(image, mode)
    assert result.mode == mode
    return np.asarray(result)


def test_transparency_is_put_on_white():
    assert as_8bit(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "RGB").tolist() == [[[255, 255, 255]]]
    assert as_8bit(Image.new("RGBA", (1, 1), (9, 8, 7, 255)), "RGB").tolist() == [[[9, 8, 7]]]
    half = as_8bit(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "RGB")
    assert half.tolist() == [[[127, 127, 127]]]
    assert as_8bit(Image.new("LA", (1, 1), (40, 0)), "L").tolist() == [[255]]
    assert as_8bit(Image.new("LA", (1, 1), (40, 255)), "L").tolist() == [[40]]


def test_grey_keeps_its_values():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    assert as_8bit(grey, "L")[0].tolist() == list(range(256))
    assert as_8bit(grey, "RGB")[0, :, 1].tolist() == list(range(256))
    assert as_8bit(Image.new("1", (1, 1), 1), "L").tolist() == [[255]]


def test_more_than_8_bits_are_scaled_to_8():
    deep = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    expected = [[0, 1, 128, 255]]
    assert as_8bit(Image.fromarray(deep), "L").tolist() == expected
    assert as_8bit(Image.fromarray(deep.astype(np.int32)), "L").tolist() == expected
    for white in (1, 255, 65535):
        values = (deep / 65535 * white).astype(np.float32)
        assert as_8bit(Image.fromarray(values), "L").tolist() == expected
    for bad in (np.array([[-1.0, 2.0]]), np.array([[1e9]]), np.array([[np.nan]])):
        with pytest.raises(ValueError, match="8 or 16 bits"):
            to_8bit(Image.fromarray(bad.astype(np.float32)), "L")


def test_other_colour_spaces_become_rgb():
    assert as_8bit(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "RGB").tolist() == [[[255, 0, 0]]]
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert as_8bit(palette, "RGB").tolist() == [[[10, 20, 30]]]
    palette.info["transparency"] = 1
    assert as_8bit(palette, "RGB").tolist() == [[[255, 255, 255]]]


def test_which_modes_are_grey():
    assert all(is_grey(mode) for mode in ("1", "L", "LA", "I", "F", "I;16", "I;16B"))
    assert not any(is_grey(mode) for mode in ("P", "RGB", "RGBA", "CMYK"))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, suffix, orientation):
    upright = noise(4, 6)
    # What a camera stores for the upright picture, written out from the EXIF standard's table.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **OPTIONS.get(suffix, {}))
    with Image.open(path) as image:
        assert (as_8bit(image, "RGB") == upright).all()


def test_damaged_metadata_does_not_lose_the_picture(tmp_path):
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png", exif=b"Exif\0\0not really")
    with Image.open(tmp_path / "a.png") as image:
        assert as_8bit(image, "RGB")[0, 0].tolist() == [1, 2, 3]
