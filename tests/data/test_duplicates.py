import io
import os
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded
from PIL import Image

from gan.data import demo, duplicates
from gan.data.duplicates import near_duplicates, perceptual_hash


def photo(index=0, size=256):
    return Image.fromarray(demo.draw(index, size))


def saved(image, kind, quality):
    return Image.open(io.BytesIO(encoded(image, kind, quality=quality))).convert("RGB")


def scaled(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def copies(image):
    """What becomes of a picture on its way through the net."""
    return [
        saved(image, "JPEG", 90),
        saved(image, "JPEG", 30),
        saved(image, "WEBP", 50),
        scaled(image, 0.5),
        scaled(image, 1.3),
        saved(scaled(image, 0.77), "JPEG", 60),
        saved(scaled(image, 0.25), "JPEG", 75),
    ]


def thumbnails(brightness):
    """Hashes of grey thumbnails, [n, 64]."""
    grey = np.full((len(brightness), 32), 128)
    rows = np.hstack([np.clip(np.rint(brightness), 0, 255), grey]).astype(np.uint8)
    return [int.from_bytes(row.tobytes(), "big") for row in rows]


def test_copies_are_found_among_others():
    pictures = [photo(i, 96) for i in range(40)]
    found = near_duplicates([perceptual_hash(image) for image in [*pictures, *copies(photo(7, 96))]])
    assert found == [[7, *range(40, 47)]]


def test_nothing_and_nearly_nothing():
    assert near_duplicates([]) == []
    assert near_duplicates([perceptual_hash(photo())]) == []
    assert near_duplicates([perceptual_hash(photo())] * 2) == [[0, 1]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (20000, 10), (10, 20000)])
def test_every_size_has_a_hash(mode, size):
    assert 0 <= perceptual_hash(Image.new(mode, size)) < 256**duplicates.BYTES


def test_flat_pictures_are_no_duplicates():
    rng = np.random.default_rng(0)
    flat = [Image.new("RGB", (32, 32), colour) for colour in ("white", "white", "black", "#fefefe")]
    grain = [Image.fromarray(rng.integers(120, 136, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    assert near_duplicates([perceptual_hash(image) for image in flat + grain]) == []


def test_another_colour_or_a_flipped_picture_is_another_picture():
    image = photo()
    red, green, blue = image.split()
    others = [Image.merge("RGB", (blue, red, green)), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    assert near_duplicates([perceptual_hash(other) for other in [image, *others]]) == []


def test_a_small_difference_in_one_place_is_one():
    image = photo()
    marked = image.copy()
    marked.paste((255, 0, 255), (96, 96, 128, 128))
    assert near_duplicates([perceptual_hash(image), perceptual_hash(marked)]) == []


def test_transparent_pictures():
    def disc(colour, radius):
        rows, columns = np.mgrid[:64, :64]
        inside = (rows - 32) ** 2 + (columns - 32) ** 2 < radius**2
        return Image.fromarray(np.where(inside[..., None], (*colour, 255), 0).astype(np.uint8))

    pictures = [disc((0, 0, 0), 20), disc((255, 255, 255), 20), disc((0, 0, 0), 14), scaled(disc((0, 0, 0), 20), 0.5)]
    assert near_duplicates([perceptual_hash(image) for image in pictures]) == [[0, 3]]


def groups_of_all_pairs(hashes):
    rows = np.frombuffer(b"".join(value.to_bytes(96, "big") for value in hashes), dtype=np.uint8).reshape(-1, 96)
    group = np.arange(len(rows))
    for i in range(len(rows)):
        same = duplicates._look_the_same(np.repeat(rows[i : i + 1], len(rows), axis=0), rows)
        group[np.isin(group, group[same])] = group[same].min()
    groups = [np.flatnonzero(group == first).tolist() for first in np.unique(group)]
    return [members for members in groups if len(members) > 1]


def drifting():
    """Pictures that are alike in fives, and one that drifts away: a chain."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 255, (30, 64))
    steps = rng.normal(0, 1.5, (200, 64)).cumsum(axis=0)
    hashes = thumbnails(np.vstack([np.repeat(centres, 5, axis=0) + rng.normal(0, 3, (150, 64)), centres[0] + steps]))
    others = thumbnails(rng.uniform(0, 250, (9, 64)))
    limits = int.from_bytes([4] * 64 + [8] * 32, "big")
    return [*hashes, *hashes[:9], *others, *(value + limits for value in others)]


def crowded(noise, colour):
    """Pictures that are all within reach of each other, and seldom the same, but for copies at the very limit."""
    rng = np.random.default_rng(0)
    brightness = np.rint(np.linspace(195, 222, 64) + rng.normal(0, noise, (600, 64)))
    brightness = np.vstack([brightness, brightness[:100] + rng.choice([-3, 3], (100, 64))])
    shades = 128 + rng.integers(-colour, colour + 1, (700, 32))
    shades[600:] = shades[:100] + rng.choice([-8, 8], (100, 32))
    rows = np.clip(np.hstack([brightness, shades]), 0, 255).astype(np.uint8)
    return [int.from_bytes(row.tobytes(), "big") for row in rows]


@pytest.mark.parametrize(
    ("hashes", "fewest"),
    [(drifting(), 10), (crowded(1.8, 0), 80), (crowded(2.2, 4), 80)],
    ids=["drifting", "crowded", "in colour"],
)
def test_groups_are_those_of_comparing_all_pairs(monkeypatch, hashes, fewest):
    expected = groups_of_all_pairs(hashes)
    assert len(expected) >= fewest
    assert near_duplicates(hashes) == expected
    for name, value in {"ROWS": 7, "COLUMNS": 11, "FEW": 5, "STRIP": 2}.items():
        monkeypatch.setattr(duplicates, name, value)
    for directions in (3, 96):
        monkeypatch.setattr(duplicates, "DIRECTIONS", directions)
        assert near_duplicates(hashes) == expected


def test_many_pictures_and_many_copies_of_one():
    rng = np.random.default_rng(0)
    directions = rng.normal(0, 1, (8, 64))
    different = 128 + rng.normal(0, 30, (12000, 8)) @ directions / 2
    copied = different[0] + rng.uniform(-3, 3, (4000, 64))
    start = time.process_time()
    found = near_duplicates(thumbnails(np.vstack([different, copied])))
    assert time.process_time() - start < 5  # 200,000 take 7 s
    assert {0, *range(12000, 16000)} <= set(found[0])
    assert sum(map(len, found)) < 4200


def nearly_the_same(count):
    """Hashes of faint pictures, all within reach of each other, of which hardly any two are the same."""
    return thumbnails(np.linspace(200, 222, 64) + np.random.default_rng(0).normal(0, 2, (count, 64)))


def test_many_pictures_that_are_nearly_the_same():
    hashes, notes, steps = nearly_the_same(8000), [], []
    hashes += hashes[:3]
    start = time.process_time()
    found = near_duplicates(hashes, lambda *step: steps.append(step), notes.append)
    assert time.process_time() - start < 3  # 200,000 take a minute; one by one, 8,000 would
    assert [group for group in found if group[-1] >= 8000] == [[0, 8000], [1, 8001], [2, 8002]]
    assert notes == []
    assert steps == sorted(steps)
    assert steps[-1] == (8000, 8000)


def test_a_search_that_takes_too_long_leaves_some_out_and_says_so(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_WASTED", 20_000)
    monkeypatch.setattr(duplicates, "ROWS", 16)
    rng = np.random.default_rng(0)
    dark, bright = rng.uniform(0, 100, (600, 64)), rng.uniform(155, 255, (600, 64))
    crowd = np.linspace(117, 139, 64) + rng.normal(0, 1.8, (2000, 64))
    hashes, notes = thumbnails(np.vstack([dark, crowd, bright, dark[:3] + 1, bright[:3] + 1])), []
    found = near_duplicates(hashes, report=notes.append)
    (number,) = re.fullmatch(
        r"look-alikes may be missing: ([\d,]+) images .* not compared with all of them", *notes
    ).groups()
    assert 300 < int(number.replace(",", "")) < 1000  # of the crowd
    pairs = [[i, 3200 + i] for i in range(3)] + [[2600 + i, 3203 + i] for i in range(3)]
    assert [group for group in found if group[-1] >= 3200] == pairs  # the crowd leaves something for the others
    assert found == near_duplicates(hashes)  # nobody has to listen


@pytest.mark.skipif("GAN_TEST_DATA" not in os.environ, reason="GAN_TEST_DATA names no folder of photographs")
@pytest.mark.parametrize(("file", "images"), [("clothing-photos.zip", 2), ("noto-emoji.zip", 78)])
def test_copies_are_found_among_real_pictures(file, images):
    """`images`: that look like others, of 1900 and of 3583."""
    with zipfile.ZipFile(Path(os.environ["GAN_TEST_DATA"]) / file) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".png")))
        hashes, again = [], {}
        for i, name in enumerate(names):
            with Image.open(io.BytesIO(archive.read(name))) as image:
                hashes.append(perceptual_hash(image if image.mode == "RGBA" else image.convert("RGB")))
                if i % 100 == 50 and image.mode == "RGB":
                    again[i] = perceptual_hash(saved(scaled(image, 0.6), "JPEG", 60))
    found = near_duplicates([*hashes, *again.values()])
    for copy, original in enumerate(again, start=len(hashes)):
        assert [group for group in found if original in group and copy in group], names[original]
    assert len({i for group in near_duplicates(hashes) for i in group}) <= images
