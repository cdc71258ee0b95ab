"""A dataset and a network so small that a run takes seconds."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pictures import encoded

# A network of a few thousand parameters, 8 steps of 125 images to the thousand.
TINY = ["--cbase", "64", "--cmax", "8", "--map-depth", "1", "--batch", "125", "--mbstd-group", "5", "--kimg", "1"]
TINY += ["--workers", "0", "--device", "cpu", "--precision", "fp32"]


def write_dataset(
    path: Path,
    count: int = 40,
    size: int | tuple[int, int] = 16,
    channels: int = 3,
    classes: int = 0,
    class_names: Sequence[str] | None = None,
    multi_hot: bool = False,
) -> Path:
    """A zip in the layout of dataset_tool.py: coloured gradients, one class after the other.

    Args:
        size: of squares, or (width, height).
        multi_hot: labels are vectors with a 1 for the class and the first one.
    """
    classes = len(class_names or []) or classes
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        labels = []
        for i in range(count):
            corners = rng.integers(0, 256, [2, 2, channels], dtype=np.uint8)
            image = PIL.Image.fromarray(corners[:, :, 0] if channels == 1 else corners).resize((width, height))
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, encoded(image, compress_level=0))
            label = i % classes if classes else 0
            labels.append([name, [int(c in (0, label)) for c in range(classes)] if multi_hot else label])
        content: dict[str, Any] = {"labels": labels if classes else None}
        if class_names:
            content["class_names"] = list(class_names)
        archive.writestr("dataset.json", json.dumps(content))
    return path
