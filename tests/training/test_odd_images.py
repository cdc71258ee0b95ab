"""Images that are no squares and have alpha, with several labels each, all the way from the zip to samples."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from runs import RUN, assert_same, interrupted, run_train
from tiny import write_dataset

from gan import models
from gan.cli.generate import generate
from gan.config import DataInfo, TrainConfig
from gan.data.dataset import ImageDataset
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import disk
from gan.training.grid import SampleGrid, sheet_shape
from gan.training.plan import MemoryEstimate
from gan.training.run_folder import read_options

NAMES = ("round", "red", "hat")


@pytest.mark.usefixtures("light_runs")
def test_a_run_of_transparent_96x64_images_with_several_labels_each(tmp_path: Path, outdir: Path) -> None:
    data = write_dataset(tmp_path / "odd.zip", 24, (96, 64), channels=4, class_names=NAMES, multi_hot=True)
    new_run = ["--data", data, "--cond", *RUN, "--batch", 5, "--aug", "fixed", "--p", 0.5, "--mirror"]
    interrupted(4, *new_run)
    interrupted(2, *new_run)
    whole, parts = sorted(outdir.glob("0*"))
    interrupted(4, "--resume", parts)

    assert read_options(whole).data.described == "96x64 RGBA"
    assert "48 images, 96x64 RGBA, 3 label values" in (whole / "log.txt").read_text()
    assert_same(whole, parts)
    for name in ("reals.png", "fakes_init.png", "fakes000000.png"):
        with PIL.Image.open(whole / name) as sheet:
            assert (sheet.mode, sheet.size) == ("RGBA", (4 * 96, 2 * 64))
    assert np.asarray(PIL.Image.open(whole / "reals.png"))[..., 3].std() > 10

    snapshot = whole / "network-snapshot-000000.pkl"
    kwargs = models.load(snapshot).training_set_kwargs
    assert (kwargs["resolution"], kwargs["label_kind"]) == ([64, 96], "multi-hot")
    assert kwargs["class_names"] == list(NAMES)
    sample = ["--network", str(snapshot), "--seeds", "1", "--outdir"]
    for folder, labels in {"a": ["--class", "hat", "--class", "round"], "b": ["--label", "1,0,1"]}.items():
        result = CliRunner().invoke(generate, [*sample, str(tmp_path / folder), *labels])
        assert result.exit_code == 0, result.output
    picture = PIL.Image.open(tmp_path / "a" / "seed0001.png")
    assert (picture.mode, picture.size) == ("RGBA", (96, 64))
    assert np.array_equal(picture, PIL.Image.open(tmp_path / "b" / "seed0001.png"))


def test_a_run_goes_on_only_with_images_like_its_own(tmp_path: Path, whole: Path) -> None:
    data = write_dataset(tmp_path / "other.zip", size=(24, 16), channels=4)
    result = run_train("--resume", whole, "--data", data)
    assert result.exit_code == 1
    assert (
        "other.zip: holds 40 images of 24x16 RGBA with 0 label values, but the run was started with 40 images of 16x16 "
        "RGB with 0 label values; give the dataset of the run with --data"
    ) in result.output


@pytest.mark.usefixtures("light_runs")
def test_a_run_goes_on_only_with_classes_like_its_own(tmp_path: Path, outdir: Path) -> None:
    data = write_dataset(tmp_path / "a.zip", 8, class_names=("cat", "dog"), multi_hot=True)
    interrupted(1, "--data", data, "--cond", *RUN)
    write_dataset(tmp_path / "a.zip", 8, class_names=("apple", "pear"), multi_hot=True)
    result = run_train("--resume", *outdir.glob("0*"))
    assert result.exit_code == 1
    assert "a.zip: its classes are apple, pear, but the run was started with cat, dog; give the" in result.output


def config_of(width: int, height: int, channels: int = 3) -> TrainConfig:
    return resolve(TrainOptions(data="x", batch=8), DataInfo("x", "x", 10, height, width, channels))


def test_estimates_go_by_the_area() -> None:
    square, wide = config_of(64, 64), config_of(96, 64)
    assert MemoryEstimate.of(wide).per_image == pytest.approx(1.5 * MemoryEstimate.of(square).per_image)
    assert disk.sheet_bytes(config_of(256, 128)) == disk.sheet_bytes(config_of(128, 256)) * 30 * 32 // (32 * 16)
    assert disk.sheet_bytes(config_of(64, 64, 4)) * 3 == disk.sheet_bytes(square) * 4


@pytest.mark.parametrize(
    ("size", "sheet"),
    [
        *(((side, side), (32, 32)) for side in (16, 64, 128)),
        ((256, 256), (30, 16)),
        ((1024, 1024), (7, 4)),
        ((512, 256), (15, 16)),
        ((256, 512), (30, 8)),
        ((4096, 64), (7, 32)),
    ],
)
def test_sheets_hold_what_8k_hold(size: tuple[int, int], sheet: tuple[int, int]) -> None:
    assert sheet_shape(*size) == sheet


@pytest.mark.parametrize(("labels", "different"), [("classes", 2), ("vectors", 40)])
def test_rows_of_a_sheet_show_one_class_but_not_one_vector(tmp_path: Path, labels: str, different: int) -> None:
    """A row of one image 32 times would show nothing."""
    folder = tmp_path / "images"
    with zipfile.ZipFile(write_dataset(tmp_path / "a.zip", classes=20)) as archive:
        archive.extractall(folder)
    if labels == "vectors":
        rows = json.loads((folder / "dataset.json").read_text())["labels"]
        vectors = [[name, [i / 7, 1.0]] for i, (name, _) in enumerate(rows)]
        (folder / "dataset.json").write_text(json.dumps({"labels": vectors}))
    grid = SampleGrid.choose(ImageDataset(folder, use_labels=True), z_dim=2, seed=0)
    assert len(set(grid.indices[: grid.columns].tolist())) == min(different, grid.columns)
