"""Open the networks of a file, whoever wrote it, without executing anything in it.

What a file is, its content says, not its name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from gan.errors import GanError, without_password
from gan.image_size import describe_image
from gan.models import rebuild
from gan.models.description import Contents
from gan.models.download import Progress, forget, local_path
from gan.models.formats import port, safetensors_file, snapshot_pickle, tensorflow
from gan.models.snapshot import Snapshot
from gan.models.wording import brief, cut
from gan.snapshot_names import kimg_of, name_of
from torch_utils import persistence, torch_file, torch_legacy
from torch_utils.safe_pickle import Opaque, StoredTensor, check_sizes

_LONGEST_ERROR = 2000  # characters
_START = 512  # bytes that tell what a file is
_PICKLE = b"\x80"
_OTHERS = (  # what is mistaken for a file of networks, by how it begins
    (rb"\s*<", "it is a web page, not a model; the download went wrong, so fetch the file itself"),
    (rb"version https://git-lfs", "it is a Git LFS pointer, not the file; fetch it with: git lfs pull"),
    (rb"\x1f\x8b", "it is a gzip file; unpack it first"),
    (rb"BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "it is a packed archive; unpack it first"),
    (rb"(?s:.{257})ustar", "it is a tar archive; unpack it first"),
    (
        rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]",
        "it is an ONNX file, which can be run but not opened as a network here",
    ),
    (rb"\x89HDF", "it is an HDF5 file, which holds no StyleGAN2 networks that are known"),
    (rb"\x93NUMPY", "it is a NumPy array, not a model"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "it is a picture, not a model"),
)
_STATE_KEYS = {"format", "state", "tracker"}  # of training-state.pt
_IMAGE = re.compile(r".+\.(png|jpe?g|webp|bmp)", re.IGNORECASE)


def load(where: str | os.PathLike[str], *, base: str | None = None, progress: Progress | None = None) -> Snapshot:
    """Open a file with networks: a snapshot of any generation, a checkpoint of the PyTorch port, safetensors.

    Args:
        where: a path, an address, or a name of a public model.
        base: where the public models are, if not at their usual address.
        progress: called while a file is fetched, see `download`.

    Raises GanError, naming the file, if it cannot be had or read, is something else, or holds networks not like ours.
    """
    path = local_path(os.fspath(where), base, progress)
    source = without_password(os.fspath(where))
    try:
        contents = _read(path)
        networks = _built(contents)
        augment_p = _probability(contents.augment_p)
    except OSError as error:
        raise GanError(f"{source}: cannot be read ({error.strerror or error})") from error
    except ImportError as error:
        raise GanError(f"{source}: opening it needs the package {error.name}: pip install {error.name}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # PyTorch's own, of a CPU's memory
            raise
        raise GanError(f"{source}: opening it takes more memory than there is") from error
    except ValueError as error:
        forgotten = forget(os.fspath(where), path)
        again = "; it is no longer kept, and will be fetched again the next time" if forgotten else ""
        raise GanError(f"{source}: {cut(' '.join(str(error).split()), _LONGEST_ERROR)}{again}") from error
    return Snapshot(
        G=networks.get("G"),
        D=networks.get("D"),
        G_ema=networks.get("G_ema"),
        augment_p=augment_p,
        training_set_kwargs=contents.training_set_kwargs,
        source=source,
        kind=contents.kind,
        notes=tuple(contents.notes),
    )


def _built(contents: Contents) -> dict[str, Any]:
    tensors = [tensor for described in contents.networks.values() for tensor in described.tensors.values()]
    check_sizes(tensor for tensor in tensors if isinstance(tensor, StoredTensor))
    built = {}
    for name, description in contents.networks.items():
        try:
            built[name] = rebuild.build(description)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        first = next(iter(built))
        if (takes := _images_and_labels(built[name])) != (wanted := _images_and_labels(built[first])):
            raise ValueError(f"its networks do not fit together: {name} is for {takes}, {first} for {wanted}")
    return built


def _images_and_labels(network: Any) -> str:
    height, width = network.img_size
    labels = f"labels of {network.c_dim} numbers" if network.c_dim else "no labels"
    return f"{describe_image(height, width, network.img_channels)} and {labels}"


def _probability(stored: object) -> float | None:
    if stored is None:
        return None
    if not isinstance(stored, (int, float)) or not 0 <= stored <= 1:
        raise ValueError(f"its augmentation probability is {brief(stored)}, not a number from 0 to 1")
    return float(stored)


def _read(path: Path) -> Contents:
    if path.is_dir():
        raise ValueError(_folder(path))
    with open(path, "rb") as file:
        start = file.read(_START)
        file.seek(0)
        if not start:
            raise ValueError("it is empty; copy or download it again")
        if safetensors_file.looks_like_one(start):
            return safetensors_file.read(str(path))
        if start.startswith(b"PK"):
            return _read_zip(file)
        if torch_legacy.looks_like_one(start):
            return _contents(torch_file.load(file))
        for pattern, what in _OTHERS:
            if re.match(pattern, start):
                raise ValueError(what)
        if not start.startswith(_PICKLE):
            raise ValueError("it is no model of a kind that is known: a snapshot, a checkpoint, safetensors")
        return _contents(persistence.load(file))


def _read_zip(file: BinaryIO) -> Contents:
    """A zip: what torch.save writes nowadays, or something else."""
    try:
        names = torch_file.names_in_zip(file)  # zipfile would take many times the memory of a hostile directory
    except ValueError as error:
        raise ValueError("it is a zip file that is cut short or damaged; copy or download it again") from error
    if any(name.endswith("/data.pkl") for name in names):
        file.seek(0)
        return _contents(torch_file.load(file))
    if any(os.path.basename(name) == "dataset.json" or _IMAGE.fullmatch(name) for name in names):
        raise ValueError("it is a zip of images, a dataset; give it to --data, and here a model")
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError("it is an .npz file of NumPy arrays, not a model")
    raise ValueError("it is a zip file without networks; if there is a model in it, unpack it first")


def _contents(content: object) -> Contents:
    """What a pickle or torch.save held."""
    if snapshot_pickle.is_one(content):
        return snapshot_pickle.read(content)  # type: ignore[arg-type]
    if tensorflow.is_one(content):
        return tensorflow.read(content)  # type: ignore[arg-type]
    if isinstance(content, Opaque) and content.global_name == tensorflow.NETWORK:
        raise ValueError("it is one network of the TensorFlow generation, not a snapshot of three")
    if isinstance(content, dict) and content.keys() >= _STATE_KEYS:
        raise ValueError("it is a training state, to continue its run: use --resume with the run's folder")
    if port.is_one(content):
        return port.read(content)  # type: ignore[arg-type]
    raise ValueError(
        "it is not a network snapshot (no G, D or G_ema in it), nor a checkpoint of another kind that is known"
    )


def _folder(path: Path) -> str:
    kimgs = [kimg for each in path.glob("*.pkl") if (kimg := kimg_of(each.name)) is not None]
    if kimgs:
        return f"it is a folder; give a file in it, such as {name_of(max(kimgs))}"
    return "it is a folder; give the file of a model"
