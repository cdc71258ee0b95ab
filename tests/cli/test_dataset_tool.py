import json
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
        "demo: 20 images, 20 usable",
        "  sizes       64x64 (20)",
        "  modes       RGB (20)",
        f"Packed 20 images of 64x64 RGB into my demo.zip ({(tmp_path / 'my demo.zip').stat().st_size / 1e6:.1f} MB)",
        "Next: python train.py --data 'my demo.zip'",
    ]


@pytest.mark.parametrize("size", [("--resolution", "32x32"), ("--width", 32, "--height", 32)])
def test_size_transform_and_filter_reach_the_images(run, tmp_path, size):
    code, out, _ = run(
        "--source", "demo", "--dest", "d", *size, "--transform", "center-crop", "--resize-filter", "box",
        "--max-images", 2,
    )  # fmt: skip
    assert code == 0
    assert "Packed 2 images of 32x32 RGB into d (" in out
    with Image.open(tmp_path / "d" / "00000" / "img00000001.png") as image:
        assert image.size == (32, 32)


def test_skipped_files_are_named_up_to_a_hundred(run, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "in" / "good.png")
    for number in range(105):
        (tmp_path / "in" / f"bad{number:03d}.png").write_text("x")
    (tmp_path / "in" / "IMG_1.HEIC").write_text("x")
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "in" / "dataset.json").write_text('{"labels": [["good.png", 2]]}')
    code, out, _ = run("--source", "in", "--dest", "out.zip")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "in: 107 images, 1 usable"
    assert "  labels      3 classes from dataset.json: 0 (0), 1 (0), 2 (1)" in lines
    assert "              2 classes of these without an image" in lines
    assert "  LEFT OUT    106 images:" in lines
    assert any(line.startswith("    IMG_1.HEIC: kind not read") for line in lines)
    assert "    bad098.png: not an image, or damaged at its start" in lines
    assert "bad099" not in out
    assert "    and 6 more, all of them in dataset.json of out.zip" in lines
    assert "  ignored     1 file that is no image (1 x .txt)" in lines
    assert lines[-2].startswith("Packed 1 image of 8x8 grey into out.zip")
    assert lines[-1] == "Next: python train.py --data out.zip  (add --cond to train on its labels)"
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert len(json.loads(archive.read("dataset.json"))["skipped"]) == 106

    code, out, err = run("--source", "in", "--dest", "strict.zip", "--strict")
    assert code == 1
    assert "bad104.png" in out  # there is no file to look them up in
    assert err.startswith("error: --strict: 106 images would be left out")
    assert not (tmp_path / "strict.zip").exists()


def test_a_scan_packs_nothing_and_shows_what_would_be_packed(run, tmp_path):
    (tmp_path / "in").mkdir()
    noise = Image.effect_noise((40, 30), 80)
    noise.save(tmp_path / "in" / "a.png")
    noise.save(tmp_path / "in" / "b.bmp")
    noise.resize((400, 300)).save(tmp_path / "in" / "c.png")
    Image.effect_noise((200, 200), 80).convert("RGB").save(tmp_path / "in" / "d.jpg")
    (tmp_path / "in" / "bad.png").write_text("x")
    code, out, _ = run("--source", "in", "--scan-only", "--resolution", "64x32")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "in: 5 images, 4 usable"
    assert "  enlarged    2 images, kept: a.png (1.60 times), b.bmp (1.60 times)" in lines
    assert "  equal       1 image more than once, kept: a.png = b.bmp" in lines
    assert "  look alike  1 image more than once, kept: a.png = c.png" in lines
    assert "    bad.png: not an image, or damaged at its start" in lines
    found = json.loads((tmp_path / "scan.json").read_text())
    assert found["sizes"] == {"40x30": 2, "400x300": 1, "200x200": 1}
    assert found["modes"] == {"L": 3, "RGB": 1}
    assert found["skipped"] == [["bad.png", "not an image, or damaged at its start"]]
    assert found["exact_duplicates"] == [["a.png", "b.bmp"]]
    with Image.open(tmp_path / "scan.png") as sheet:
        assert sheet.width > 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "scan.json", "scan.png"]
    assert out.splitlines()[-2:] == ["Written: scan.json", "Written: scan.png, images as they would be packed"]
    code, _, err = run("--source", "in", "--scan-only", "--strict")
    assert (code, err) == (1, "error: --strict: 1 image would be left out, 0 bad labels, see above\n")
    assert run("--source", "in", "--scan-only", "--dest", "there")[0] == 0  # of any size
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["scan.json", "scan.png"]


def test_a_scan_of_nothing_usable_says_so_and_lists_it(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("x")
    code, out, err = run("--source", "in", "--scan-only")
    assert code == 1
    assert "none of its 1 images can be used" in err
    assert json.loads((tmp_path / "scan.json").read_text())["skipped"] == [
        ["a.png", out.splitlines()[2].split(": ")[1]]
    ]
    assert "scan.png" not in out
    code, _, err = run(
        "--source", "in", "--scan-only", "--dest", "there.zip", "--channels", "cmyk", "--labels", "no.csv"
    )
    assert code == 2
    assert [line.split()[1] for line in err.splitlines()] == ["--channels", "--dest", "--labels"]


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
        (["--resolution", "100x100", "--max-images", -1], ["try --resolution 96x96", "--max-images -1"]),
        (
            ["--background", "wihte", "--labels", "no.csv"],
            ["--background wihte: is no colour", "--labels no.csv: no such"],
        ),
        (["--workers", -1], ["--workers -1: must be at least 1"]),
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
    Image.new("RGB", (41, 30)).save(tmp_path / "a.png")
    code, _, err = run("--source", tmp_path, "--dest", "out.zip")
    assert code == 1
    assert err.count("\n") == 1
    assert "a.png is 41x30" in err
    assert "--resolution 16x16" in err
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no such device")
@pytest.mark.parametrize("where", ["full", "latin"])
def test_a_report_that_cannot_be_printed_costs_no_work(tmp_path, where):
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "\u732b.png").write_text("x")
    command = [sys.executable, str(ROOT / "dataset_tool.py"), "--source", "in", "--dest", "out.zip"]
    with open("/dev/full" if where == "full" else tmp_path / "said", "w") as out:
        environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
        result = subprocess.run(command, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, env=environment, check=False)
    assert b"Traceback" not in result.stderr
    assert len(zipfile.ZipFile(tmp_path / "out.zip").namelist()) == 2
    assert where == "full" or "    ?.png: not an image" in (tmp_path / "said").read_text()
