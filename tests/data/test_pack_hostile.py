"""A folder of everything that ends other programs' long runs, packed through the command line."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise, raw_png, turned
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = 5000
OPTIONS = ("--resolution", "16x16")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="symlinks, such names and kill -9 are POSIX")


def bomb():
    """A small file that is an intact PNG of 900 million white pixels."""
    side = 30_000
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" + b"\xff" * (side // 8)) for _ in range(side)) + rows.flush()
    return raw_png(side, side, 1, 0, data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder; the names of what can be packed; the names of what cannot."""
    root = tmp_path_factory.mktemp("hostile") / "photos"
    (root / "tiny").mkdir(parents=True)
    picture = Image.fromarray(noise(64, 64, 3))
    jpeg = encoded(picture, "JPEG")
    frames = [Image.new("P", (32, 32), colour) for colour in range(3)]

    (root / "bad" / "nested").mkdir(parents=True)
    (root / "bad" / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "bad" / "empty.png").write_bytes(b"")
    (root / "bad" / "nested" / "text.PNG").write_text("this is no image\n" * 100)
    (root / "bad" / "bomb.png").write_bytes(bomb())
    os.symlink("gone.png", root / "bad" / "dangling.png")
    bad = ["bad/truncated.jpg", "bad/empty.png", "bad/nested/text.PNG", "bad/bomb.png", "bad/dangling.png"]

    os.symlink("..", root / "bad" / "loop")
    os.symlink(root, root / "tiny" / "again")
    good = {
        "one-pixel.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
        "strip.png": lambda path: Image.new("RGB", (20_000, 10), "green").save(path),
        "grey-alpha.png": lambda path: Image.new("LA", (32, 32), (9, 99)).save(path),
        "cmyk.JPG": lambda path: Image.new("CMYK", (32, 32), (0, 255, 0, 0)).save(path, "JPEG"),
        "16-bit.png": lambda path: Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(path),
        "rotated.jpeg": lambda path: picture.save(path, exif=turned(6)),
        "animated.gif": lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]),
        "Übung 猫 \U0001f408.webp": lambda path: picture.save(path),
        "n" * 251 + ".png": lambda path: picture.save(path),
        "new\nline.bmp": lambda path: picture.save(path),
    }
    for name, save in good.items():
        save(root / name)
    for i in range(TINY):
        pixels = np.full((8, 8, 3), [i % 251, i // 251, 77], dtype=np.uint8)
        Image.fromarray(pixels).save(root / "tiny" / f"{i:04d}.png")
    return root, [*good, *(f"tiny/{i:04d}.png" for i in range(TINY))], bad


def command(source, dest):
    return [sys.executable, str(ROOT / "dataset_tool.py"), "--source", str(source), "--dest", str(dest), *OPTIONS]


@pytest.fixture(scope="module")
def packed(hostile, tmp_path_factory):
    """The zip of a run that nobody disturbed, and what it printed."""
    dest = tmp_path_factory.mktemp("packed") / "a.zip"
    result = subprocess.run(command(hostile[0], dest), capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return dest, result.stdout


def test_it_is_packed_to_the_end_with_every_casualty_named(hostile, packed):
    _, good, bad = hostile
    dest, out = packed
    with zipfile.ZipFile(dest) as archive:
        content = json.loads(archive.read("dataset.json"))
        images = [name for name in archive.namelist() if name.endswith(".png")]
        assert archive.testzip() is None
        shapes = {np.asarray(Image.open(io.BytesIO(archive.read(name)))).shape for name in images[:20]}
    assert len(images) == len(good)
    assert shapes == {(16, 16, 3)}
    assert sorted(name for name, _ in content["skipped"]) == sorted(bad)
    for name, reason in content["skipped"]:
        assert f"    {name}: {reason}" in out.splitlines()
    assert f"Packed {len(good):,} images of 16x16 RGB" in out


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_killed_in_the_middle_and_started_again_it_gives_the_same_zip(hostile, packed, tmp_path):
    dest = tmp_path / "b.zip"
    kills = 0
    for wanted in (1_000_000, 3_000_000):  # bytes of the unfinished zip, which has about 5 million in the end
        with subprocess.Popen(command(hostile[0], dest), stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                if sum(path.stat().st_size for path in tmp_path.iterdir()) > wanted:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
        assert not dest.exists()
    assert kills == 2
    result = subprocess.run(command(hostile[0], dest), capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Going on after " in result.stdout
    assert sha(dest) == sha(packed[0])
    assert [path.name for path in tmp_path.iterdir()] == ["b.zip"]
