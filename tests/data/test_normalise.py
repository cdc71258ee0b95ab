import io
import struct
import warnings
import zlib

import numpy as np
import profiles
import pytest
from pictures import noise, turned
from PIL import Image

from gan.data import normalise
from gan.data.normalise import has_alpha, is_grey, profile_problem, to_8bit, upright_size

OPTIONS = {"webp": {"lossless": True}}


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


def as_file(data, kind):
    file = io.BytesIO()
    Image.fromarray(data).save(file, kind)
    return Image.open(file)


def test_a_tiff_of_32_bit_integers_may_hold_8_bits():
    for values, expected in (([0, 9, 200], [0, 9, 200]), ([0, 257, 65535], [0, 1, 255])):
        image = as_file(np.array([values], dtype=np.int32), "TIFF")
        assert image.mode == "I"
        assert as_8bit(image, "L").tolist() == [expected]
    # Of 16 bits it is known what is white: a dark image stays dark, whatever mode Pillow has for it.
    dark = np.array([[0, 9, 200]])
    pgm = Image.open(io.BytesIO(b"P5 3 1 65535\n" + dark.astype(">u2").tobytes()))
    assert pgm.mode == "I"
    for image in (as_file(dark.astype(np.uint16), "TIFF"), png_of_16_bits(dark, 0), pgm):
        assert as_8bit(image, "L").tolist() == [[0, 0, 1]]
    signed = as_file(dark.astype(np.uint16), "TIFF")
    data = bytearray(signed.fp.getvalue())
    signed_entry = struct.pack("<HHIHH", 339, 3, 1, 2, 0)  # SampleFormat: signed
    bits_entry = data.index(struct.pack("<HHI", 284, 3, 1))  # PlanarConfiguration, which is not needed
    data[bits_entry : bits_entry + 12] = signed_entry
    image = Image.open(io.BytesIO(bytes(data)))
    assert image.mode == "I"
    assert as_8bit(image, "L").tolist() == [[0, 0, 1]]


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
    upright = noise(4, 6, 3)
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
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=turned(orientation), **OPTIONS.get(suffix, {}))
    with Image.open(path) as image:
        assert (as_8bit(image, "RGB") == upright).all()


def test_damaged_metadata_does_not_lose_the_picture(tmp_path):
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png", exif=b"Exif\0\0not really")
    with Image.open(tmp_path / "a.png") as image:
        assert as_8bit(image, "RGB")[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_upright_size_is_known_before_decoding(tmp_path, orientation):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=turned(orientation))
    with Image.open(tmp_path / "a.jpg") as image:
        assert upright_size(image) == ((4, 6) if orientation == 6 else (6, 4))
        assert to_8bit(image, "RGB").size == upright_size(image)


def test_transparency_is_put_on_the_background():
    for image in (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), Image.new("LA", (1, 1), (7, 0))):
        assert np.asarray(to_8bit(image, "RGB", (10, 20, 30))).tolist() == [[[10, 20, 30]]]
    assert np.asarray(to_8bit(Image.new("LA", (1, 1), (7, 0)), "L", (40, 40, 40))).tolist() == [[40]]


def test_alpha_is_kept_if_asked_and_hides_nothing():
    pixels = np.array([[[1, 2, 3, 255], [4, 5, 6, 1], [7, 8, 9, 0]]], dtype=np.uint8)
    image = Image.fromarray(pixels)
    kept = np.asarray(to_8bit(image, "RGBA", (10, 20, 30)))
    assert kept.tolist() == [[[1, 2, 3, 255], [4, 5, 6, 1], [10, 20, 30, 0]]]
    assert (np.asarray(image) == pixels).all()  # it was not changed in place
    assert as_8bit(Image.new("RGB", (1, 1), (1, 2, 3)), "RGBA").tolist() == [[[1, 2, 3, 255]]]
    assert as_8bit(Image.new("L", (1, 1), 9), "RGBA").tolist() == [[[9, 9, 9, 255]]]


def transparent_palette(as_bytes):
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = b"\x80\xff" if as_bytes else 0
    return palette


def test_every_kind_of_transparency():
    assert as_8bit(transparent_palette(True), "RGBA").tolist() == [[[0, 0, 0, 128], [10, 20, 30, 255]]]
    assert as_8bit(transparent_palette(False), "RGBA").tolist() == [[[255, 255, 255, 0], [10, 20, 30, 255]]]
    premultiplied = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert np.abs(as_8bit(premultiplied.convert("RGBa"), "RGBA").astype(int) - (200, 100, 0, 128)).max() <= 1
    grey = Image.new("LA", (1, 1), (200, 128))
    assert np.abs(as_8bit(grey.convert("La"), "RGBA").astype(int) - (200, 200, 200, 128)).max() <= 1
    keyed = Image.new("RGB", (1, 1), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    assert as_8bit(keyed, "RGB").tolist() == [[[255, 255, 255]]]
    for image in (transparent_palette(True), premultiplied.convert("RGBa"), grey.convert("La"), keyed):
        assert has_alpha(image)
    assert not any(has_alpha(Image.new(mode, (1, 1))) for mode in ("L", "RGB", "P", "CMYK", "I;16", "F"))


def png_of_16_bits(pixels, colour_type, transparent=None):
    """uint16 [H, W] or [H, W, channels] as a PNG, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0))]
    if transparent is not None:
        parts.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)))


def test_pngs_of_16_bits():
    grey = np.array([[0, 257, 65535]])
    assert as_8bit(png_of_16_bits(grey, 0), "L").tolist() == [[0, 1, 255]]
    keyed = as_8bit(png_of_16_bits(grey, 0, (257,)), "RGBA")
    assert keyed[0, :, 3].tolist() == [255, 0, 255]
    assert keyed[0, :, 0].tolist() == [0, 255, 255]
    with_alpha = as_8bit(png_of_16_bits(np.array([[[257 * 9, 65535], [257 * 9, 0]]]), 4), "RGBA")
    assert with_alpha.tolist() == [[[9, 9, 9, 255], [255, 255, 255, 0]]]
    colours = np.array([[[257 * 1, 257 * 2, 257 * 3], [65535, 0, 0]]])
    assert as_8bit(png_of_16_bits(colours, 2), "RGB").tolist() == [[[1, 2, 3], [255, 0, 0]]]
    assert as_8bit(png_of_16_bits(colours, 2, (65535, 0, 0)), "RGB").tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_byte_orders_of_16_bits(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (3, 1), np.array([0, 257 * 7, 65535], dtype=order).tobytes())
    assert as_8bit(image, "L").tolist() == [[0, 7, 255]]


def test_colour_spaces_of_tiffs(tmp_path):
    for mode in ("LAB", "YCbCr", "CMYK", "HSV"):
        image = Image.new("RGB", (4, 4), (200, 40, 90))
        if mode != "HSV":
            image.convert(mode).save(tmp_path / "a.tif")
            image = Image.open(tmp_path / "a.tif")
            assert image.mode == mode
        else:
            image = image.convert(mode)
        with image:
            assert np.abs(as_8bit(image, "RGB").astype(int) - (200, 40, 90)).max() <= 3, mode
            assert as_8bit(image, "L").shape == (4, 4)


def test_cmyk_jpegs_are_not_negatives():
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "JPEG")  # with Adobe's marker and inverted, as theirs
    assert b"Adobe" in file.getvalue()
    assert as_8bit(Image.open(file), "RGB")[4, 4].tolist() == [255, 0, 0]


def frames():
    return [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_picture_of_several(tmp_path, suffix):
    first, second = frames()
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second], **OPTIONS.get(suffix, {}))
    with Image.open(path) as image:
        assert image.n_frames == 2
        upright = to_8bit(image, "RGB")
    assert (np.asarray(upright) == (255, 0, 0)).all()  # also once the file is closed


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_files_raise(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((OSError, SyntaxError, ValueError)), Image.open(path) as image:
        to_8bit(image, "RGB")


def test_large_images_are_no_bombs(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(tmp_path / "a.png") as image:
            assert to_8bit(image, "RGB").size == (30, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")


def with_profile(image, profile):
    image.info["icc_profile"] = profile
    return image


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_profiles_are_applied(tmp_path, suffix):
    swapped = profiles.rgb(2.2, swapped=True)
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / f"a.{suffix}", icc_profile=swapped)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        converted = as_8bit(image, "RGB")[8, 8].astype(int)
        assert profile_problem(image) is None
    assert np.abs(converted - (30, 200, 90)).max() <= 8


def test_a_linear_profile_is_brightened():
    """sRGB of 0.25 is 137: 1.055 * 0.25 ** (1 / 2.4) - 0.055."""
    for image, profile in (
        (Image.new("RGB", (1, 1), (64, 64, 64)), profiles.rgb(1)),
        (Image.new("P", (1, 1), 64), profiles.rgb(1)),
        (Image.new("RGBA", (1, 1), (64, 64, 64, 255)), profiles.rgb(1)),
        (Image.new("L", (1, 1), 64), profiles.grey(1)),
        (Image.new("LA", (1, 1), (64, 255)), profiles.grey(1)),
        (Image.fromarray(np.full((1, 1), 64 * 257, dtype=np.uint16)), profiles.grey(1)),
    ):
        if image.mode == "P":
            image.putpalette([value for value in range(256) for _ in range(3)])
        for mode in ("L", "RGB"):
            assert np.abs(as_8bit(with_profile(image, profile), mode).astype(int) - 137).max() <= 2, image.mode
    clear = with_profile(Image.new("RGBA", (1, 1), (64, 64, 64, 77)), profiles.rgb(1))
    assert as_8bit(clear, "RGBA")[0, 0, 3] == 77


def test_a_profile_of_inks_is_applied():
    for black, expected in ((0, 255), (255, 0)):
        image = with_profile(Image.new("CMYK", (1, 1), (255, 0, 0, black)), profiles.cmyk())
        assert as_8bit(image, "RGB").tolist() == [[[expected] * 3]]
        assert as_8bit(image, "RGBA").tolist() == [[[*[expected] * 3, 255]]]


def test_srgb_itself_changes_nothing():
    from PIL import ImageCms

    image = with_profile(
        Image.fromarray(noise(4, 6, 3)), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    assert to_8bit(image, "RGB") is image
    assert profile_problem(image) is None


def test_profiles_that_cannot_be_used_are_ignored_and_known(monkeypatch):
    pixels = noise(4, 6, 3)
    swapped = profiles.rgb(2.2, swapped=True)
    for profile in (b"junk", swapped[:300], profiles.grey(1), profiles.cmyk()):
        image = with_profile(Image.fromarray(pixels), profile)
        assert (as_8bit(image, "RGB") == pixels).all()
        assert profile_problem(image) == "damaged, or not one for images in RGB"
    for profile in (None, b""):
        assert profile_problem(with_profile(Image.fromarray(pixels), profile)) is None
    monkeypatch.setattr(normalise.features, "check", lambda name: False)
    normalise._from_profile.cache_clear()
    image = with_profile(Image.fromarray(pixels), swapped)
    assert (as_8bit(image, "RGB") == pixels).all()
    assert profile_problem(image) == "this build of Pillow cannot apply colour profiles"
    normalise._from_profile.cache_clear()


def test_a_profile_is_read_once():
    normalise._from_profile.cache_clear()
    for value in range(5):
        as_8bit(with_profile(Image.new("RGB", (1, 1), (value, 0, 0)), bytes(bytearray(profiles.rgb(1)))), "RGB")
    assert normalise._from_profile.cache_info()[:2] == (4, 1)  # hits, misses
