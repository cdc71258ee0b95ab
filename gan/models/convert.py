"""Convert networks into another format of file, and look at the result before it gets its name.

What was written is opened again and must be the same (see `comparison`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gan.augment import AugmentPipe
from gan.errors import GanError, UsageError
from gan.files import atomic_path, write_text
from gan.image_size import IMAGE_KINDS
from gan.models.comparison import Images, compare, compare_images
from gan.models.formats import onnx_file, port, safetensors_file
from gan.models.opening import load
from gan.models.snapshot import Snapshot, save
from gan.networks import Generator


@dataclass(frozen=True)
class Conversion:
    """How well the result agrees with what was converted."""

    num_bytes: int
    picture_difference: float | None  # the largest, of pictures that go from -1 to 1; None without a generator
    score_difference: float | None  # the largest of D's logits, None without D
    notes: Sequence[str]  # what had to be assumed or left out


@dataclass(frozen=True)
class _Wish:
    """How a file is to be written."""

    half: bool
    noise_input: bool


@dataclass(frozen=True)
class _Format:
    """A format: how to write it, and what has to be known of it."""

    write: Callable[[Path, Snapshot, _Wish], list[str]]  # returns what the file does not carry
    libraries: Sequence[str] = ()
    reduce: Callable[[torch.nn.Module], None] | None = None  # takes from a network what the file does not carry
    beside: Callable[[Snapshot, bool], str] | None = None  # the text of a .json, with half or without
    images: Callable[[Path, Generator], Images] | None = None  # where G_ema alone is written, for `program`
    program: str = ""


def _write_snapshot(path: Path, snapshot: Snapshot, wish: _Wish) -> list[str]:
    pipe = None
    if snapshot.augment_p is not None:
        pipe = AugmentPipe()
        pipe.p.fill_(snapshot.augment_p)
    networks = {"G": snapshot.G, "D": snapshot.D, "G_ema": snapshot.G_ema}
    kwargs = snapshot.training_set_kwargs
    save(path, **networks, augment_pipe=pipe, training_set_kwargs=kwargs, half=wish.half)
    return []


def _write_onnx(path: Path, snapshot: Snapshot, wish: _Wish) -> list[str]:
    G = snapshot.require_generator()
    if wish.noise_input and not onnx_file.noise_layers(G):
        raise GanError(f"{snapshot.source}: its generator has no noise; leave out --noise input")
    onnx_file.write(path, G, wish.noise_input, snapshot.class_names or ())
    return []


_PORT = _Format(lambda path, snapshot, wish: port.write(path, snapshot, wish.half), reduce=port.without_clamp)
_FORMATS = {
    ".pkl": _Format(_write_snapshot),
    ".pt": _PORT,
    ".pth": _PORT,
    ".safetensors": _Format(
        lambda path, snapshot, wish: safetensors_file.write(path, snapshot, wish.half),
        safetensors_file.LIBRARIES,
        beside=safetensors_file.config_text,
    ),
    ".onnx": _Format(_write_onnx, onnx_file.LIBRARIES, images=onnx_file.images, program="onnxruntime"),
}


def problems(src: str, dst: str | os.PathLike[str], *, half: bool = False, force: bool = False) -> list[str]:
    """What is wrong with a conversion before anything is read."""
    path = Path(dst)
    found = []
    if path.is_dir():
        return [f"{path}: is a folder; name a file in it, such as {path / (Path(src).stem + '.safetensors')}"]
    format = _FORMATS.get(path.suffix.lower())
    if format is None:
        found.append(f"{path}: the name must end in its format, one of {', '.join(_FORMATS)}")
    else:
        missing = [name for name in format.libraries if importlib.util.find_spec(name) is None]
        if missing:
            found.append(f"{path}: {path.suffix} files need {' and '.join(missing)}: pip install {' '.join(missing)}")
        if format.images is not None and half:
            found.append(f"--fp16: an {path.suffix} holds float32; a small file is a .safetensors")
    if Path(src).exists() and path.exists() and os.path.samefile(src, path):
        found.append(f"{path}: is the file to be converted; name another one")
    elif not force:
        for target in [path, *([path.with_suffix(".json")] if format and format.beside else [])]:
            if target.exists():
                found.append(f"{target}: is there already; name another file, or give --force to replace it")
    return found


def convert(
    source: Snapshot,
    dst: str | os.PathLike[str],
    *,
    only_ema: bool = False,
    half: bool = False,
    noise_input: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Write networks that were opened to `dst`, in the format that its name ends in.

    Args:
        only_ema: to share: leave out G, D, and in which folder of this machine the data were.
        half: store float16. Whoever opens the file computes in float32.
        noise_input: an .onnx takes its noise as an input, see `onnx_file`.
        force: replace a file that is there.
        say: is told what happens.

    Raises GanError, without a file left behind, if there is anything wrong with either file or they do not agree.
    """
    path = Path(dst)
    found = problems(source.source, path, half=half, force=force)
    if found:
        raise UsageError(found)
    format = _FORMATS[path.suffix.lower()]
    say(f"Read {source.source}: {_described(source)}")
    wanted, notes = _wanted(source, only_ema or format.images is not None)
    with _no_new_folder(path), atomic_path(path) as temporary:
        if format.images is not None:
            say("Exporting it, which takes PyTorch some 10 seconds")
        with _called(path, temporary):
            notes += format.write(temporary, wanted, _Wish(half, noise_input))
        say("Comparing the result with it")
        with _called(path, temporary, "nothing was written, as "):
            pictures, scores = _compare(format, wanted, temporary, half)
        num_bytes = temporary.stat().st_size
        if format.beside is not None:
            write_text(path.with_suffix(".json"), format.beside(wanted, half))
    return Conversion(num_bytes, pictures, scores, notes)


def _wanted(source: Snapshot, only_ema: bool) -> tuple[Snapshot, list[str]]:
    """What of the source goes into the file, and what there is to say of it."""
    notes = list(source.notes)
    wanted = source
    if only_ema:
        G = source.require_generator()
        if source.G_ema is None:
            notes.append("there is no G_ema in it, so G is taken for it")
        kwargs = dict(source.training_set_kwargs)
        if isinstance(kwargs.get("path"), str):
            kwargs["path"] = re.split(r"[/\\]", kwargs["path"].rstrip("/\\"))[-1]
        wanted = replace(source, G=None, D=None, G_ema=G, augment_p=None, training_set_kwargs=kwargs)
    for name, network in wanted.networks.items():
        for key, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise GanError(f"{source.source}: {name}.{key} holds NaN or infinity; convert an older snapshot")
    return wanted, notes


def _described(source: Snapshot) -> str:
    network = next(iter(source.networks.values()))
    height, width = network.img_size
    labels = f", labels of {network.c_dim} numbers" if network.c_dim else ""
    colours = IMAGE_KINDS.get(network.img_channels, f"in {network.img_channels} channels")
    return f"{source.kind}, {', '.join(source.networks)}, {width}x{height} {colours}{labels}"


def _compare(format: _Format, wanted: Snapshot, path: Path, half: bool) -> tuple[float | None, float | None]:
    """The differences of pictures and scores, see `compare`."""
    if format.images is None:
        return compare(wanted, load(path), half, format.reduce)
    G = wanted.require_generator()
    return compare_images(G, format.images(path, G), format.program), None


@contextlib.contextmanager
def _called(path: Path, temporary: Path, consequence: str = "") -> Iterator[None]:
    """Errors about a file in the making name the one that it was to be, with what follows from them."""
    try:
        yield
    except ValueError as error:  # of those who do not know the file's name
        raise GanError(f"{path}: {consequence}{error}") from error
    except GanError as error:
        about = f"{temporary}: "
        if consequence or str(error).startswith(about):
            raise GanError(f"{path}: {consequence}{str(error).removeprefix(about)}") from error
        raise


@contextlib.contextmanager
def _no_new_folder(path: Path) -> Iterator[None]:
    """Whatever goes wrong leaves no empty folder behind that was made for the file."""
    new = [folder for folder in path.absolute().parents if not folder.exists()]  # the innermost first
    try:
        yield
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):  # not made, or not empty
                folder.rmdir()
        raise
