import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from gan.cli.dataset_tool import dataset_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        result = CliRunner().invoke(dataset_tool, [str(argument) for argument in arguments])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.stdout, result.stderr

    return call


def test_the_demo_is_packed_and_the_next_command_named(run, tmp_path):
    code, out, err = run("--source", "demo", "--dest", "my demo.zip", "--max-images", 20)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"Packed 20 images into my demo.zip ({(tmp_path / 'my demo.zip').stat().st_size / 1e6:.1f} MB)",
        "  size    64x64 RGB",
        "  labels  none",
        "Next: python train.py --data 'my demo.zip'",
    ]


@pytest.mark.parametrize("size", [("--resolution", "32x32"), ("--width", 32, "--height", 32)])
def test_size_transform_and_filter_reach_the_images(run, tmp_path, size):
    code, out, _ = run(
        "--source", "demo", "--dest", "d", *size, "--transform", "center-crop", "--resize-filter", "box",
        "--max-images", 2,
    )  # fmt: skip
    assert code == 0
    assert "32x32 RGB" in out
    with Image.open(tmp_path / "d" / "00000" / "img00000001.png") as image:
        assert image.size == (32, 32)


def test_skipped_files_are_named_up_to_twenty(run, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "in" / "good.png")
    for number in range(25):
        (tmp_path / "in" / f"bad{number:02d}.png").write_text("x")
    (tmp_path / "in" / "IMG_1.HEIC").write_text("x")
    (tmp_path / "in" / "dataset.json").write_text('{"labels": [["good.png", 2]]}')
    code, out, _ = run("--source", "in", "--dest", "out.zip")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("Packed 1 image into out.zip")
    assert "  size    8x8 grey" in lines
    assert "  labels  yes, from dataset.json" in lines
    assert "  skipped 25 that could not be used:" in lines
    assert "    bad19.png: not an image, or damaged at its start" in lines
    assert "bad20" not in out
    assert "    and 5 more" in lines
    assert "  ignored 1 that are no images by name (1 x .heic)" in lines


def test_all_problems_of_a_command_line_are_told_at_once(run, tmp_path):
    code, out, err = run("--resolution", "64", "--transform", "squash", "--width", "x", "--source", "nope")
    assert (code, out) == (2, "")
    starts = ["--transform squash: ", "--resolution 64: ", "--width x: ", "--source nope: ", "--dest: "]
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == sorted(start[:-2] for start in starts)
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--transform", "center-crop"], ["--transform center-crop: needs a size"]),
        (["--width", 64], ["--width: needs --height"]),
        (["--height", 64, "--max-images", 0], ["--height: needs --width"]),
        (["--width", 64, "--height", 64, "--resolution", "64x64"], ["give one or the other"]),
        (["--resolution", "100x100", "--max-images", -1], ["try --resolution 64x64", "--max-images -1"]),
        (["--resolution", "64x"], ["write it like 256x256"]),
        (["--dest", "there/is/a.rar"], ["only .zip files and folders"]),
    ],
)
def test_a_bad_setting_is_told_before_anything_is_made(run, tmp_path, arguments, said):
    code, _, err = run("--source", "demo", "--dest", "sub/out.zip", *arguments)
    assert code == 2
    for words in said:
        assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_dest_below_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run("--source", "demo", "--dest", "file/out.zip")
    assert code == 2
    assert "is a file, not a folder" in err


def test_images_that_cannot_be_packed_as_they_are_say_what_to_add(run, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    code, _, err = run("--source", tmp_path, "--dest", "out.zip")
    assert code == 1
    assert err.count("\n") == 1
    assert "a.png is 40x30" in err
    assert "--resolution 16x16 --transform center-crop" in err
    assert not (tmp_path / "out.zip").exists()


def test_the_script_runs_from_any_folder_without_loading_torch(tmp_path):
    program = (
        "import runpy, sys; sys.argv = ['dataset_tool.py', '--source', 'demo', '--dest', 'd.zip', '--max-images', '4'];"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_path({str(ROOT / 'dataset_tool.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(zipfile.ZipFile(tmp_path / "d.zip").namelist()) == 5


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such file names")
def test_names_that_are_no_text_can_be_shown(run, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "in" / "good.png")
    with open(os.fsencode(tmp_path / "in") + b"/\xff\n.png", "wb"):
        pass
    code, out, _ = run("--source", "in", "--dest", "out.zip")
    assert code == 0
    assert "    ??.png: not an image" in out
