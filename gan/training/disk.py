"""How much room the files of a run take, and whether there is as much."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from gan.config import TrainConfig
from gan.errors import DiskFullError
from gan.files import disk_size, free_bytes, readable_size
from gan.image_size import Size
from gan.models.rebuild import ShapesOnly
from gan.networks import Discriminator, Generator
from gan.tracking.mlflow_run import MAX_PREVIEW_SIZE
from gan.tracking.mlflow_store import store_of
from gan.training.grid import sheet_shape
from gan.training.retention import snapshots_in, snapshots_to_remove

# What a file has besides the numbers, per tensor: names, and in a snapshot the source texts.
_SNAPSHOT_TENSOR, _STATE_TENSOR = 700, 300  # bytes
_PNG_SHARE = 0.75  # of the pixels' bytes: photographs and early fakes have 0.4 to 0.7, noise 1


def snapshot_bytes(config: TrainConfig) -> int:
    """Of a snapshot: both networks and the moving average of G, in float32."""
    G, D = network_shapes(config)
    tensors = [*G.state_dict().values()] * 2 + [*D.state_dict().values()]
    return 4 * _numbers(tensors) + _SNAPSHOT_TENSOR * len(tensors)


def state_bytes(config: TrainConfig) -> int:
    """Of a training state: what a snapshot has, and two moments of each parameter."""
    G, D = network_shapes(config)
    tensors = [*G.state_dict().values()] * 2 + [*D.state_dict().values()]
    parameters = [*G.parameters(), *D.parameters()]
    numbers = _numbers(tensors) + 2 * _numbers(parameters)
    return 4 * numbers + _STATE_TENSOR * (len(tensors) + 3 * len(parameters))


def sheet_bytes(config: TrainConfig) -> int:
    """The most that a sheet of fakes takes, unless they are noise."""
    width, height = _sheet_size(config)
    return int(_PNG_SHARE * width * height * config.data.channels)


def tensor_bytes(value: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    return sum(tensor_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of those files that are there."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def check_room(path: Path, needed: int) -> None:
    """Raises DiskFullError if a file of `needed` bytes, give or take 5 %, cannot be written to `path`.

    The last 16 MB, or the last hundredth of a small disk, are left to what is smaller: statistics and the log.
    """
    wanted, free = _wanted_and_free(path, needed)
    if free < wanted:
        raise DiskFullError(
            f"{path}: no space left on the device: about {readable_size(wanted)} are needed and {readable_size(free)} "
            f"are free; free some, or choose another place"
        )


def has_room(path: Path, needed: int) -> bool:
    """Whether `check_room` would let it pass."""
    wanted, free = _wanted_and_free(path, needed)
    return free >= wanted


def snapshots_due(config: TrainConfig) -> list[int]:
    """When a run writes snapshots, in kimg as in their names: after its first step, every `snap` ticks, at its end."""
    batch = config.batch_size
    tick = math.ceil(config.tick_kimg * 1000 / batch) * batch
    end = math.ceil(config.total_kimg * 1000 / batch) * batch
    return sorted({nimg // 1000 for nimg in (*range(batch, end, tick * config.snap), end)})


def forecast(config: TrainConfig, free: int, nimg: int = 0, present: Collection[int] = ()) -> tuple[str, str | None]:
    """What the run takes when it is complete, in a line, and one that warns if that is more than there is.

    Args:
        free: bytes.
        nimg: images shown so far; what was due until then is there.
        present: snapshots that are there, in kimg.
    """
    due = snapshots_due(config)
    kimgs = sorted({*present, *(kimg for kimg in due if nimg == 0 or kimg > nimg // 1000)})
    num_left = len(kimgs) - len(snapshots_to_remove(kimgs, config.keep, config.keep_every, ()))
    num_sheets = len(due) + 2
    snapshot, sheet, state = snapshot_bytes(config), sheet_bytes(config), state_bytes(config)
    copies = _mlflow_bytes(config)
    total = num_left * snapshot + num_sheets * (sheet + copies) + config.keep_states * state
    of_all = f" of {len(kimgs)}" if num_left < len(kimgs) else ""
    in_mlflow = f" (and {readable_size(copies)} in MLflow)" if copies else ""
    line = (
        f"{num_left}{of_all} snapshots of {readable_size(snapshot)}, "
        f"{num_sheets} sheets of up to {readable_size(sheet)}{in_mlflow}, "
        f"{config.keep_states} state{'s' * (config.keep_states > 1)} of {readable_size(state)}: "
        f"up to {readable_size(total)} when the run is complete; {readable_size(free)} are free"
    )

    def full_at(keep: int | None) -> int | None:
        other = dataclasses.replace(config, keep=keep)
        return _full_at(other, kimgs, free, present, nimg, (snapshot, sheet + copies, state))

    full = full_at(config.keep)
    if full is None:
        return line, None
    fewer = next((keep for keep in (10, 5, 2, 1) if keep < (config.keep or 11) and full_at(keep) is None), None)
    remedies = [
        "free some of it",
        *(["name another place with --outdir"] if nimg == 0 else []),
        f"keep fewer snapshots with --keep {fewer}" if fewer else "write fewer files with a larger --snap",
    ]
    return line, f"the disk may be full at about {full} kimg: {', or '.join(remedies)}"


def outlook(config: TrainConfig, folder: Path, nimg: int = 0) -> list[str]:
    """The lines of `forecast` as a run in `folder` says them when it starts."""
    line, warning = forecast(config, free_bytes(folder), nimg, snapshots_in(folder))
    return [f"Disk:      {line}", *([f"WARNING:   {warning}"] if warning else [])]


def _full_at(
    config: TrainConfig, kimgs: list[int], free: int, present: Collection[int], nimg: int, sizes: tuple[int, int, int]
) -> int | None:
    """The first of the snapshots `kimgs` for which there is no room; None: there is for all.

    A new snapshot or state is written before an old one is removed.
    """
    snapshot, sheet, state = sizes
    there, num_sheets = sorted(present), 0 if nimg else 2
    num_states = 1 if nimg else config.keep_states + 1
    for kimg in kimgs:
        if kimg in present or (nimg and kimg <= nimg // 1000):
            continue
        there.append(kimg)
        num_sheets += 1
        if (len(there) - len(present)) * snapshot + num_sheets * sheet + num_states * state > free:
            return kimg
        for gone in snapshots_to_remove(there, config.keep, config.keep_every, ()):
            there.remove(gone)
    return None


def _wanted_and_free(path: Path, needed: int) -> tuple[int, int]:
    total, free = disk_size(path.parent)
    if total == 0:  # some network file systems do not say how large they are
        return 0, 0
    return needed + needed // 20 + min(16_000_000, total // 100), free


def _mlflow_bytes(config: TrainConfig) -> int:
    """What MLflow keeps of a sheet beside the runs: a copy, and a preview that is reduced to its longest side."""
    _, artifacts = store_of(Path())
    if artifacts is None or importlib.util.find_spec("mlflow") is None:
        return 0
    return int(sheet_bytes(config) * (1 + min(1, MAX_PREVIEW_SIZE / max(_sheet_size(config))) ** 2))


def _sheet_size(config: TrainConfig) -> Size:
    data = config.data
    columns, rows = sheet_shape(data.width, data.height)
    return columns * data.width, rows * data.height


def network_shapes(config: TrainConfig) -> tuple[Generator, Discriminator]:
    """Of no use but for their shapes."""
    with ShapesOnly():
        G = Generator(**config.network.generator_kwargs(config.data))
        return G, Discriminator(**config.network.discriminator_kwargs(config.data))


def _numbers(tensors: Collection[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
