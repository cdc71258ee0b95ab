import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from gan.data.dataset import ImageDataset
from gan.data.decode import decode, shape_of
from gan.data.image_files import open_image
from gan.data.sources import open_source
from gan.errors import GanError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


def test_neither_reader_runs_a_program_that_is_called_a_picture(tmp_path, monkeypatch):
    def ghostscript(*args, **options):
        raise AssertionError("started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    assert Image.open(io.BytesIO(EPS)).size == (8, 8)  # what Pillow would do if it were left to it
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(OSError, match="cannot identify"):
        open_source(str(tmp_path)).read(0)
    with pytest.raises(OSError, match="cannot identify"):
        shape_of(io.BytesIO(EPS))
    with pytest.raises(GanError, match="here is damaged or not an image"):
        decode(EPS, "here")
    with pytest.raises(GanError, match=r"a\.png is not a readable image"):
        ImageDataset(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM"])
def test_a_picture_may_go_by_another_s_name(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    pixels = np.full((8, 8, 3), 200, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", kind)
    image = np.asarray(open_image(tmp_path / "a.jpg").convert("RGB")).astype(int)
    assert np.abs(image - pixels).max() <= 3
    assert decode((tmp_path / "a.jpg").read_bytes(), "here").shape == (3, 8, 8)
