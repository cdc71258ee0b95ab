"""What `dataset_tool.py` and `gan.data.pack` may be asked for, and what is wrong with how they are asked."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageColor

from gan.data.dataset_files import LABEL_FILE
from gan.data.transforms import RESIZE_FILTERS, TRANSFORMS, output_size
from gan.image_size import Size, is_trainable, largest_trainable

CHANNELS = {"auto": None, "grey": "L", "rgb": "RGB", "rgba": "RGBA"}  # and Pillow's mode for each
OTHER_ARCHIVES = {".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """How images are packed."""

    resolution: Size | None = None
    """width and height of what is packed; None: images stay as they are, and must be of one size"""
    transform: str | None = None
    """one of TRANSFORMS; None: center-crop with a resolution, nothing without"""
    resize_filter: str = "lanczos"
    """one of RESIZE_FILTERS"""
    channels: str = "auto"
    """one of CHANNELS; auto: grey if all images are, otherwise rgb"""
    background: str = "white"
    """what transparent images lie on, and the borders of fit: a colour's name or #rrggbb"""
    labels: str | None = None
    """folders, none, or a CSV or JSON file; None: those that the source has of its own"""
    max_images: int | None = None
    """look at no more than the first so many whose headers can be read"""

    def __post_init__(self) -> None:
        if isinstance(self.resolution, Sequence):  # a list, say
            object.__setattr__(self, "resolution", tuple(self.resolution))

    @property
    def effective_transform(self) -> str:
        """The transform that is meant."""
        return self.transform or ("none" if self.resolution is None else "center-crop")

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """Red, green and blue. Raises ValueError if it is no colour, or a transparent one."""
        red, green, blue, *alpha = ImageColor.getrgb(self.background)
        if alpha:
            raise ValueError("it is transparent")
        return red, green, blue

    def problems(self) -> list[str]:
        """What is wrong, each problem with its flag, value and remedy."""
        problems, transform = [], self.effective_transform
        if transform not in TRANSFORMS:
            problems.append(f"--transform {transform}: is not one of {', '.join(TRANSFORMS)}")
        if transform in TRANSFORMS and transform != "none" and self.resolution is None:
            problems.append(
                f"--transform {transform}: needs a size; add --resolution WxH, such as --resolution 256x256"
            )
        if self.resolution is not None:
            problems += _resolution_problems(self.resolution, transform)
        for flag, value, known in (
            ("--resize-filter", self.resize_filter, RESIZE_FILTERS),
            ("--channels", self.channels, CHANNELS),
        ):
            if value not in known:
                problems.append(f"{flag} {value}: is not one of {', '.join(known)}")
        try:
            self.background_rgb  # noqa: B018
        except ValueError:
            problems.append(f"--background {self.background}: is no colour that covers; write it like white or #ff8000")
        if self.labels not in (None, "none", "folders") and not Path(self.labels).is_file():
            problems.append(f"--labels {self.labels}: no such file; name a CSV or JSON file, folders, or none")
        if self.max_images is not None and self.max_images < 1:
            problems.append(f"--max-images {self.max_images}: must be at least 1")
        return problems


def dest_problems(source: str, dest: str | Path) -> list[str]:
    """Why `dest` cannot take a dataset made from `source`, as far as can be told without writing."""
    path = Path(dest)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        return [f"--dest {dest}: {parent} is a file, not a folder; choose another place"]
    if not os.access(parent, os.W_OK):
        return [f"--dest {dest}: {parent} cannot be written to; choose a folder that you may write to"]
    if os.path.exists(source) and path.exists() and os.path.samefile(source, path):
        return [f"--dest {dest}: is the --source itself; choose another name"]
    if path.suffix.lower() == ".zip":
        return _zip_problems(path)
    if path.suffix.lower() in OTHER_ARCHIVES:
        return [f"--dest {dest}: only .zip files and folders can be written; name one of these"]
    if path.is_file():
        return [f"--dest {dest}: is a file; name a file that ends in .zip, or a new folder"]
    if path.is_dir() and any(path.iterdir()):
        return [f"--dest {dest}: is a folder that is not empty; empty it, or name a new one"]
    if path.is_dir() and (os.path.ismount(path) or path.samefile(".")):  # neither can be replaced in the end
        return [f"--dest {dest}: is a disk of its own, or the current folder; name a new folder in it"]
    if os.path.isdir(source) and Path(source).resolve() in path.resolve().parents:
        return [f"--dest {dest}: is inside of the --source, whose images it would be next time; choose another place"]
    return []


def _zip_problems(path: Path) -> list[str]:
    if path.is_dir():
        return [f"--dest {path}: is a folder; name a file that ends in .zip"]
    if not path.exists():
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            ours = LABEL_FILE in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        ours = False
    return [] if ours else [f"--dest {path}: is there, and no dataset; choose another name, or remove it first"]


def _resolution_problems(resolution: Size, transform: str) -> list[str]:
    if not isinstance(resolution, tuple) or [type(side) for side in resolution] != [int, int]:
        return [f"--resolution {resolution}: is not a width and a height in pixels"]
    width, height = resolution
    given = f"--resolution {width}x{height}"
    if min(resolution) < 1:
        return [f"{given}: must be at least 1 pixel each way"]
    if transform == "center-crop-wide" and height > width:
        return [f"{given}: --transform center-crop-wide needs a width of at least the height"]
    made = output_size(transform, resolution) if transform in TRANSFORMS else resolution
    if is_trainable(made):
        return []
    better = largest_trainable(made)
    if transform == "center-crop-wide":  # a square, of which the crop takes this share
        better = better[0], max(1, better[0] * height // width)
    return [
        f"{given}: training needs a small size doubled some times, such as 256x256 (4x4) or 384x256 (6x4); "
        f"try --resolution {better[0]}x{better[1]}"
    ]
