"""Convert a file of networks into another format, and look at the result before it gets its name.

What was written is opened again and must make the same pictures of the same latents, and judge them the same. What a
format cannot carry (float16 rounds, the PyTorch port has no conv_clamp) is told apart from everything else: the file is
compared with the source as the format can carry it, exactly, and with the source itself, to be told.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gan.augment import AugmentPipe
from gan.errors import GanError, UsageError, one_line
from gan.files import atomic_path
from gan.image_size import IMAGE_KINDS
from gan.models.download import Progress, local_path
from gan.models.formats import onnx_file, port, safetensors_file
from gan.models.opening import load
from gan.models.snapshot import Snapshot, save
from gan.networks import Generator

FORMATS = (".pkl", ".pt", ".pth", ".safetensors", ".onnx")
_PORT = (".pt", ".pth")
_LIBRARIES = {".safetensors": safetensors_file.LIBRARIES, ".onnx": onnx_file.LIBRARIES}
_BATCHES = ((3, 1.0), (1, 0.5))  # pictures, truncation psi
_NUM_PICTURES = sum(number for number, _ in _BATCHES)
# Of pictures that go from -1 to 1; larger ones are allowed more. Rounding in another order of sums is far below.
_SAME, _SAME_ELSEWHERE = 1e-5, 1e-3

_Images = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of z [N, z_dim], c [N, c_dim] and psi


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how well it agrees."""

    source: Snapshot
    path: Path
    source_bytes: int
    num_bytes: int
    picture_difference: float | None  # the largest, of pictures that go from -1 to 1; None without a generator
    score_difference: float | None  # the largest of D's logits, None without D
    notes: Sequence[str]  # what had to be assumed or left out


def problems(src: str, dst: str | os.PathLike[str], *, half: bool = False, force: bool = False) -> list[str]:
    """What is wrong with a conversion before anything is read."""
    path = Path(dst)
    suffix, found = path.suffix.lower(), []
    missing = [name for name in _LIBRARIES.get(suffix, ()) if importlib.util.find_spec(name) is None]
    if path.is_dir():
        return [f"{path}: is a folder; name a file in it, such as {path / (Path(src).stem + '.safetensors')}"]
    if suffix not in FORMATS:
        found.append(f"{path}: the name must end in its format, one of {', '.join(FORMATS)}")
    if missing:
        found.append(f"{path}: {suffix} files need {' and '.join(missing)}: pip install {' '.join(missing)}")
    if suffix == ".onnx" and half:
        found.append("--fp16: an .onnx holds float32; a small file is a .safetensors")
    if Path(src).exists() and path.exists() and os.path.samefile(src, path):
        found.append(f"{path}: is the file to be converted; name another one")
    elif not force:
        for target in (path, *_beside(path)):
            if target.exists():
                found.append(f"{target}: is there already; name another file, or give --force to replace it")
    return found


def convert(
    src: str,
    dst: str | os.PathLike[str],
    *,
    only_ema: bool = False,
    half: bool = False,
    noise: str = "const",
    force: bool = False,
    base: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Write the networks of `src` to `dst`, in the format that its name ends in.

    Args:
        src: a file, an address or a name, as for `load`; base and progress go there too.
        only_ema: leave out G and D.
        half: store float16. Whoever opens the file computes in float32.
        noise: for .onnx, 'const' or 'input', see `onnx_file`.
        force: replace a file that is there.
        say: is told what happens.

    Raises GanError, without a file left behind, if there is anything wrong with either file or they do not agree.
    """
    path = Path(dst)
    found = problems(src, path, half=half, force=force)
    if found:
        raise UsageError(found)
    source = load(src, base=base, progress=progress)
    say(f"Read {source.source}: {_described(source)}")
    wanted, notes = _wanted(source, path, only_ema)
    with contextlib.ExitStack() as files:
        for beside in _beside(path):
            text = safetensors_file.config_text(wanted, half)
            files.enter_context(atomic_path(beside)).write_text(text, encoding="utf-8")
        temporary = files.enter_context(atomic_path(path))
        if path.suffix.lower() == ".onnx":
            say("Exporting it, which takes PyTorch some 10 seconds")
        with _called(path, temporary):
            notes += _write(temporary, path.suffix.lower(), wanted, half, noise)
        say("Comparing the result with it")
        with _called(path, temporary, f"{path}: nothing was written, as "):
            picture_difference, score_difference = _compare(wanted, temporary, path.suffix.lower(), half)
        num_bytes = temporary.stat().st_size
    source_bytes = local_path(src, base).stat().st_size
    return Conversion(source, path, source_bytes, num_bytes, picture_difference, score_difference, notes)


def _beside(path: Path) -> list[Path]:
    """What is written beside a file."""
    return [path.with_suffix(".json")] if path.suffix.lower() == ".safetensors" else []


def _wanted(source: Snapshot, path: Path, only_ema: bool) -> tuple[Snapshot, list[str]]:
    """What of the source goes into the file, and what there is to say of it."""
    notes = list(source.notes)
    wanted = source
    if only_ema or path.suffix.lower() == ".onnx":
        G = source.require_generator()
        if source.G_ema is None:
            notes.append("there is no G_ema in it, so G is taken for it")
        wanted = replace(source, G=None, D=None, G_ema=G, augment_p=None)
    for name, network in _networks(wanted).items():
        for key, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise GanError(f"{source.source}: {name}.{key} holds NaN or infinity; convert an older snapshot")
    return wanted, notes


def _networks(snapshot: Snapshot) -> dict[str, Any]:
    there = {name: getattr(snapshot, name) for name in ("G", "D", "G_ema")}
    return {name: network for name, network in there.items() if network is not None}


def _described(source: Snapshot) -> str:
    there = _networks(source)
    network = next(iter(there.values()))
    height, width = network.img_size
    labels = f", labels of {network.c_dim} numbers" if network.c_dim else ""
    colours = IMAGE_KINDS.get(network.img_channels, f"in {network.img_channels} channels")
    return f"{source.kind}, {', '.join(there)}, {width}x{height} {colours}{labels}"


@contextlib.contextmanager
def _called(path: Path, temporary: Path, consequence: str = "") -> Iterator[None]:
    """Errors about a file in the making name the one that it was to be, after what follows from them."""
    try:
        yield
    except GanError as error:
        raise GanError(consequence + str(error).replace(str(temporary), str(path))) from error


def _write(path: Path, suffix: str, snapshot: Snapshot, half: bool, noise: str) -> list[str]:
    """Write the file; what it does not carry."""
    if suffix == ".onnx":
        G = snapshot.require_generator()
        if noise == "input" and not onnx_file.noise_layers(G):
            raise GanError(f"{snapshot.source}: its generator has no noise; leave out --noise input")
        onnx_file.write(path, G, noise, snapshot.training_set_kwargs.get("class_names") or ())
        return []
    if suffix == ".safetensors":
        return safetensors_file.write(path, snapshot, half)
    if suffix in _PORT:
        return port.write(path, snapshot, half)
    pipe = None
    if snapshot.augment_p is not None:
        pipe = AugmentPipe()
        pipe.p.fill_(snapshot.augment_p)
    networks = {name: getattr(snapshot, name) for name in ("G", "D", "G_ema")}
    save(path, **networks, augment_pipe=pipe, training_set_kwargs=snapshot.training_set_kwargs, half=half)
    return []


@torch.no_grad()
def _compare(source: Snapshot, path: Path, suffix: str, half: bool) -> tuple[float | None, float | None]:
    """The largest differences of pictures and of D's logits. Raises GanError if there are unexplained ones."""
    if suffix == ".onnx":
        return _compare_onnx(source.require_generator(), path), None
    written = load(path)
    picture_differences, score_difference = [], None
    images: torch.Tensor | None = None
    for name in ("G", "G_ema"):
        if (there := getattr(source, name)) is not None:
            again, carried = _again(name, source, written, suffix, half)
            images = _pictures(there, _torch_images(there))
            found = _pictures(there, _torch_images(again))
            expected = images if carried is there else _pictures(there, _torch_images(carried))
            _check(expected, found, _SAME, f"opened again, its {name} makes other pictures")
            picture_differences.append(_largest(images, found))
    if source.D is not None:
        again, carried = _again("D", source, written, suffix, half)
        if images is None:
            images = torch.randn([_NUM_PICTURES, source.D.img_channels, *source.D.img_size])
        logits, found = _logits(source.D, images), _logits(again, images)
        expected = logits if carried is source.D else _logits(carried, images)
        _check(expected, found, _SAME, "opened again, its D judges otherwise")
        score_difference = _largest(logits, found)
    return max(picture_differences, default=None), score_difference


def _compare_onnx(G: Generator, path: Path) -> float:
    noise = [const.flatten() for const in onnx_file.noise_layers(G).values()]
    noises = torch.cat(noise) if noise else torch.zeros([0])
    try:
        session = onnx_file.Session(path)
        found = _pictures(G, lambda z, c, psi: session(z, c, psi, noises))
    except Exception as error:  # onnxruntime has errors of its own
        raise GanError(f"onnxruntime cannot compute it: {one_line(error)}") from error
    expected = _pictures(G, _torch_images(G))
    _check(expected, found, _SAME_ELSEWHERE, "onnxruntime makes other pictures of it")
    return _largest(expected, found)


def _again(
    name: str, source: Snapshot, written: Snapshot, suffix: str, half: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network as it was written, and what it must equal: the source's, or a copy with what the format explains.

    Raises GanError if a tensor differs by more than that.
    """
    there, again = getattr(source, name), getattr(written, name)
    if again is None:
        raise GanError(f"{name} is not in it")
    tensors = again.state_dict()
    for key, tensor in there.state_dict().items():
        if key not in tensors or not _stored_alike(tensor, tensors[key], half):
            raise GanError(f"{name}.{key} is another tensor in it")
    if not half and suffix not in _PORT:  # nothing to explain
        return again, there
    carried = copy.deepcopy(there)
    carried.load_state_dict({key: tensors[key] for key in there.state_dict()})
    if suffix in _PORT:
        for module in carried.modules():
            if getattr(module, "conv_clamp", None) is not None:
                module.conv_clamp = None
    return again, carried


def _stored_alike(before: torch.Tensor, after: torch.Tensor, half: bool) -> bool:
    """Equal, or with half as far apart as rounding to float16 makes them."""
    if before.shape != after.shape:
        return False
    if not half:
        return torch.equal(before, after)
    return bool(((before - after).abs() <= before.abs() * 2**-11 + 2**-25).all())


def _torch_images(G: Any) -> _Images:
    return lambda z, c, psi: G(z, c, truncation_psi=psi, noise_mode="const", force_fp32=True)


def _pictures(G: Generator, compute: _Images) -> torch.Tensor:
    """The same latents and labels for everyone, `[_NUM_PICTURES, C, H, W]`; G says of which sizes."""
    images, first = [], 0
    tracked = G.mapping.w_avg_beta is not None  # without a mean there is no truncation
    for number, psi in _BATCHES:
        seeds = range(first, first + number)
        z = torch.from_numpy(np.concatenate([np.random.RandomState(seed).randn(1, G.z_dim) for seed in seeds])).float()
        images.append(compute(z, _labels(G.c_dim)[first : first + number], psi if tracked else 1.0))
        first += number
    return torch.cat(images)


def _logits(D: Any, images: torch.Tensor) -> torch.Tensor:
    """Of as many images as one minibatch-stddev group has room for."""
    group = D.b4.mbstd.group_size if D.b4.mbstd is not None else None
    number = min(group or _NUM_PICTURES, _NUM_PICTURES)
    logits: torch.Tensor = D(images[:number], _labels(D.c_dim)[:number], force_fp32=True)
    return logits


def _labels(c_dim: int) -> torch.Tensor:
    """`[_NUM_PICTURES, c_dim]`: the first classes in turn."""
    return torch.eye(c_dim)[torch.arange(_NUM_PICTURES) % max(c_dim, 1)] if c_dim else torch.zeros([_NUM_PICTURES, 0])


def _largest(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max())


def _check(expected: torch.Tensor, found: torch.Tensor, limit: float, complaint: str) -> None:
    largest = _largest(expected, found) if expected.shape == found.shape else float("nan")
    if not largest <= limit * max(1.0, float(expected.abs().max())):
        raise GanError(f"{complaint} (largest difference {largest:.3g}); please report it")
