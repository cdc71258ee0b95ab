"""Detectors: where they are found, what is none, and what a detector is asked."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from detectors import FEATURES, write_detectors, write_script

from gan.errors import GanError
from gan.metric_names import INCEPTION, VGG
from gan.metrics.detectors import Detectors, prefetch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detectors(tmp_path_factory.mktemp("detectors"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of detectors, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAN_DETECTORS", raising=False)
    monkeypatch.delenv("GAN_PRETRAINED_BASE", raising=False)
    return tmp_path / "cache" / "stylegan2-ada-trainer" / "detectors"


def test_folders_are_looked_into_in_their_order(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Detectors().path(INCEPTION) is None
    cache.mkdir(parents=True)
    shutil.copy(folder / INCEPTION, cache)
    assert Detectors().path(INCEPTION) == cache / INCEPTION
    monkeypatch.setenv("GAN_DETECTORS", str(folder))
    assert Detectors().path(INCEPTION) == folder / INCEPTION
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(folder / INCEPTION, own)
    detectors = Detectors(str(own))
    assert detectors.path(INCEPTION) == own / INCEPTION
    assert detectors.path(VGG) == folder / VGG


def test_what_is_missing_is_one_line_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / VGG, tmp_path)
    line = Detectors(str(tmp_path)).missing_line([INCEPTION, VGG])
    assert line.startswith(f"{INCEPTION} is not here (looked in {tmp_path}, ")
    assert "--prefetch" in line
    assert "--detectors DIR" in line
    assert VGG not in line
    assert "\n" not in line
    with pytest.raises(GanError, match="is not here"):
        Detectors(str(tmp_path)).load(INCEPTION, CPU)


def test_a_detector_answers_for_grey_rgb_and_rgba_without_a_warning(folder: Path) -> None:
    detectors = Detectors(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inception, vgg = detectors.load(INCEPTION, CPU), detectors.load(VGG, CPU)
        rgba = torch.randint(256, [3, 4, 20, 24], dtype=torch.uint8)
        features = inception.features(rgba)
        probabilities = inception.probabilities(rgba[:, :3])
        distances = vgg.lpips(rgba[:, :3].float())
    assert features.shape == (3, FEATURES)
    assert torch.equal(features, inception.features(rgba[:, :3]))
    grey = rgba[:, :1]
    assert torch.equal(inception.features(grey), inception.features(grey.repeat(1, 3, 1, 1)))
    assert probabilities.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert distances.shape[0] == 3
    assert distances.shape[1] > FEATURES  # of places, not of the whole picture
    assert detectors.load(INCEPTION, CPU) is inception
    assert inception.sha256 == detectors.sha256(INCEPTION) != detectors.sha256(VGG)


class _Other(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Pictures(torch.nn.Module):
    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img


def _truncated(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) // 2])


def _one_bit(path: Path, good: bytes) -> None:
    place = len(good) // 3
    path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_truncated, "no TorchScript file, or cut short"),
        (_one_bit, "damaged|no TorchScript|cannot be loaded"),
        (lambda path, good: path.write_bytes(b""), "no TorchScript file"),
        (lambda path, good: path.write_bytes(b"<!DOCTYPE html><html>404</html>"), "a web page"),
        (lambda path, good: path.write_bytes(b"\x80\x04K\x01."), "a pickle"),
        (lambda path, good: torch.save({"a": torch.ones(2)}, path), "no TorchScript file"),
        (lambda path, good: write_script(path, _Other()), "is not the detector.*return_features"),
        (lambda path, good: write_script(path, _Pictures()), r"is not the detector.*it gives \[2, 3, 64, 64\]"),
    ],
)
def test_what_is_no_detector_is_one_line(folder: Path, tmp_path: Path, write: object, reason: str) -> None:
    path = tmp_path / INCEPTION
    write(path, (folder / INCEPTION).read_bytes())  # type: ignore[operator]
    with pytest.raises(GanError, match=reason) as caught:
        Detectors(str(tmp_path)).load(INCEPTION, CPU)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "--prefetch" in text


def test_prefetch_takes_them_from_a_folder_or_address_and_only_what_is_not_there(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    zoo = tmp_path / "zoo"
    (zoo / "metrics").mkdir(parents=True)
    shutil.copy(folder / INCEPTION, zoo / "metrics")
    assert prefetch([INCEPTION], base=str(zoo)) == [cache / INCEPTION]
    assert Detectors().load(INCEPTION, CPU).name == INCEPTION
    (zoo / "metrics" / INCEPTION).unlink()
    assert prefetch([INCEPTION], base=str(zoo)) == [cache / INCEPTION]
    own = tmp_path / "own"
    (zoo / "metrics" / VGG).write_bytes((folder / VGG).read_bytes())
    assert prefetch([VGG], str(own), base=zoo.as_uri()) == [own / VGG]
    (zoo / "metrics" / VGG).unlink()
    with pytest.raises(GanError, match="no such file"):
        prefetch([VGG], base=str(zoo))
    assert prefetch([INCEPTION], str(own), base=str(zoo)) == [own / INCEPTION]  # to be carried elsewhere
    assert Detectors(str(own)).sha256(INCEPTION) == Detectors(str(folder)).sha256(INCEPTION)


def test_what_was_fetched_and_is_no_detector_is_not_put_in_place(folder: Path, cache: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / VGG).write_text("<html>")
    with pytest.raises(GanError, match="web page"):
        prefetch([VGG], base=str(zoo))
    assert not (cache / VGG).exists()
    assert (zoo / VGG).exists()
