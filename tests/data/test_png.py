import io
import zlib

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from gan.data import png
from gan.data.png import encode_png

pyspng = pytest.importorskip("pyspng")


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (64, 96), (257, 255), (1, 70000), (70000, 1)])
def test_pixels_are_read_back_as_they_were(height, width, channels):
    pixels = noise(height, width, *channels)
    data = encode_png(pixels)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == {(): "L", (3,): "RGB", (4,): "RGBA"}[channels]
        assert (np.asarray(image) == pixels).all()
    assert (pyspng.load(data).reshape(pixels.shape) == pixels).all()


def test_rows_in_any_memory_order():
    pixels = noise(6, 8, 3)
    for view in (pixels[::-1], pixels[:, ::-1], pixels.transpose(1, 0, 2), pixels[..., 0], pixels[2:4, 1:5]):
        assert (np.asarray(Image.open(io.BytesIO(encode_png(view)))) == view).all()


@pytest.mark.parametrize("size", [png.STORED_BLOCK - 1, png.STORED_BLOCK, png.STORED_BLOCK + 1, 2 * png.STORED_BLOCK])
def test_blocks_that_are_just_full(size):
    pixels = noise(1, size - 1)  # and a byte for the filter
    data = encode_png(pixels)
    assert (np.asarray(Image.open(io.BytesIO(data))) == pixels).all()
    stream = data[data.index(b"IDAT") + 4 : data.rindex(b"IEND") - 8]
    assert zlib.decompress(stream) == b"\0" + pixels.tobytes()


def test_checksums_are_right():
    data = encode_png(noise(4, 4, 3))
    kinds, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunk = data[place + 4 : place + 8 + length]
        assert zlib.crc32(chunk) == int.from_bytes(data[place + 8 + length : place + 12 + length], "big")
        kinds.append(chunk[:4])
        place += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_nothing_is_compressed_and_little_is_added():
    assert encode_png(noise(64, 64, 3)) == encode_png(noise(64, 64, 3))
    assert 64 * 64 * 3 < len(encode_png(np.zeros((64, 64, 3), dtype=np.uint8))) < 64 * 64 * 3 + 64 + 100
