"""Checkpoints of the widely used PyTorch port: `.pt` files with state dicts `g_ema`, `g`, `d`, other names than ours.

The same mathematics, but for what the port has no option for: square RGB images of a power of two, no labels, a skip
generator with noise, a resnet discriminator, learning rates of mapping layers scaled by 0.01. Options are not stored;
they follow from names and shapes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gan.errors import GanError
from gan.models.description import MAX_TENSORS, Contents, Description
from gan.models.rebuild import build, with_filters
from gan.models.snapshot import Snapshot
from gan.models.wording import cut, listed
from gan.networks import Discriminator, Generator, MappingNetwork
from torch_utils.ops import upfirdn2d
from torch_utils.pickle_writer import halved
from torch_utils.safe_pickle import Opaque, StoredTensor, check_sizes

_FILTER = (1.0, 3.0, 3.0, 1.0)
_LR_MULTIPLIER = 0.01
_MBSTD_GROUP = 4
_MEAN_LATENTS = 10_000
_MAX_MAPPING_WEIGHTS = 2**24  # that the mean latent is computed with; eight layers of 512 have 2**21
_MAX_DRAWN = 2048  # pixels of the side of images for which noise is drawn
_OWN_MULTIPLIERS = (1, 2)  # of the widths that its program builds

_Tensors = Mapping[str, StoredTensor | torch.Tensor]


class _Place(NamedTuple):
    """Where a tensor of ours lies in the port."""

    name: str
    before: int = 0  # ones that its shape has more, in front
    after: int = 0  # and behind
    gain: int = 1  # that it is multiplied by: filters make up for the zeros between the pixels of an enlarged image


def is_one(content: object) -> bool:
    """Whether a file's content looks like such a checkpoint: of whole networks, or the tensors of a generator."""
    if not isinstance(content, dict):
        return False
    return _holds_networks(content) or _is_generator(_without_prefix(content))


def read(content: dict[Any, Any]) -> Contents:
    """The networks of a checkpoint; its optimisers, arguments and anything else are not looked at.

    Raises ValueError if tensors have unknown names or shapes.
    """
    if not _holds_networks(content):
        content = {"g_ema": content}
    parts = [content[key] for key in ("g", "d", "g_ema") if isinstance(content.get(key), dict)]
    check_sizes(tensor for part in parts for tensor in part.values() if isinstance(tensor, StoredTensor))
    notes: list[str] = []
    found = {}
    for key, name in (("g", "G"), ("d", "D"), ("g_ema", "G_ema")):
        if content.get(key) is not None:
            try:
                tensors = _state_dict(content[key])
                describe = _discriminator if name == "D" else _generator
                found[name] = describe(tensors, content, notes)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    return Contents(
        kind="checkpoint of the PyTorch port",
        networks=found,
        augment_p=_number(content.get("ada_aug_p")),
        notes=tuple(dict.fromkeys(notes)),
    )


def write(path: Path, snapshot: Snapshot, half: bool = False) -> list[str]:
    """Write the networks of a snapshot to exactly this path, with `half` in float16 all that takes room.

    Returns what the layout cannot carry and can do without. Raises GanError if it cannot carry a network.
    """
    generator = snapshot.require_generator()
    notes: list[str] = []
    networks: dict[str, Generator | Discriminator | None] = {"g": snapshot.G, "d": snapshot.D, "g_ema": generator}
    content: dict[str, Any] = {}
    for key, network in networks.items():
        if network is not None:
            reasons = _obstacles(network)
            if reasons:
                raise GanError(f"{snapshot.source}: the layout of the PyTorch port cannot carry it: {listed(reasons)}")
            notes += _losses(network)
            content[key] = _port_tensors(network, half)
    if snapshot.G_ema is None:
        notes.append("its g_ema is G, as there is no moving average")
    means = [network.mapping.w_avg for network in (snapshot.G, generator) if network is not None]
    content["latent_avg"] = means[-1].detach().float().cpu().clone()
    if not torch.equal(means[0], means[-1]):
        notes.append("there is one mean latent (w_avg) in such a file: G gets that of G_ema")
    if snapshot.augment_p is not None:
        content["ada_aug_p"] = float(snapshot.augment_p)
    torch.save(content, path)
    return list(dict.fromkeys(notes))


def _holds_networks(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(content.get(key), (dict, Opaque)) for key in ("g_ema", "g", "d"))


def _state_dict(stored: object) -> dict[str, StoredTensor]:
    if isinstance(stored, Opaque):
        raise ValueError(
            f"it is a whole {cut(stored.global_name, 80)!r}, not its tensors; save its state_dict() instead"
        )
    if not isinstance(stored, dict) or len(stored) > MAX_TENSORS:
        raise ValueError("it is not a dict of tensors")
    tensors = _without_prefix(stored)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise ValueError(f"its {cut(name, 80) if isinstance(name, str) else 'content'!r} is not a tensor")
    return tensors


def _without_prefix(stored: Mapping[Any, Any]) -> dict[str, Any]:
    """Names of tensors as they were before DataParallel put itself around the network."""
    names = [name for name in stored if isinstance(name, str)]
    if names and len(names) == len(stored) and all(name.startswith("module.") for name in names):
        return {name.removeprefix("module."): stored[name] for name in names}
    return dict(stored)


def _is_generator(tensors: Mapping[str, Any]) -> bool:
    return all(name in tensors for name in ("style.1.weight", "input.input", "conv1.conv.weight"))


def _generator(tensors: dict[str, StoredTensor], content: dict[Any, Any], notes: list[str]) -> Description:
    if not _is_generator(tensors):
        raise ValueError("its tensors are not named like those of a StyleGAN2 generator of the PyTorch port")
    depth = _count(tensors, r"style\.(\d+)\.weight")
    num_blocks = 1 + _count(tensors, r"convs\.(\d+)\.conv\.weight") // 2
    first, last = _shape(tensors, "style.1.weight", 2), _shape(tensors, f"style.{depth}.weight", 2)
    widths = {4: _shape(tensors, "conv1.conv.weight", 5)[1]}
    for i in range(num_blocks - 1):
        widths[8 << i] = _shape(tensors, f"convs.{2 * i + 1}.conv.weight", 5)[1]
    kwargs: dict[str, Any] = {
        "z_dim": first[1],
        "c_dim": 0,
        "w_dim": last[0],
        "img_resolution": max(widths),
        "img_channels": _shape(tensors, "to_rgb1.conv.weight", 5)[1],
        "mapping_kwargs": {"num_layers": depth, "layer_features": first[0], "lr_multiplier": _LR_MULTIPLIER},
        "synthesis_kwargs": {**_channels(widths), "resample_filter": _filter(tensors)},
    }
    places = dict(_generator_places(max(widths), depth))
    stored: _Tensors = tensors
    if not any(name.startswith("noises.") for name in tensors):
        stored = {**tensors, **_noises(places, max(widths))}  # older versions of the port did not keep them
        notes.append("its noise inputs were not stored: fixed ones are drawn")
    ours = _renamed(stored, places)
    latent_avg = content.get("latent_avg")
    if isinstance(latent_avg, StoredTensor):
        ours["mapping.w_avg"] = latent_avg.tensor().reshape(-1)
    else:
        ours["mapping.w_avg"] = _mean_latent(ours, kwargs)
        notes.append(f"the mean latent was not stored: that of {_MEAN_LATENTS} random ones is used for truncation")
    return with_filters(Description(Generator, kwargs, ours))


def _discriminator(tensors: dict[str, StoredTensor], content: dict[Any, Any], notes: list[str]) -> Description:
    if "convs.0.0.weight" not in tensors or "final_linear.1.weight" not in tensors:
        raise ValueError("its tensors are not named like those of a StyleGAN2 discriminator of the PyTorch port")
    num_blocks = _count(tensors, r"convs\.(\d+)\.conv1\.0\.weight")
    resolution = 4 << num_blocks
    from_rgb = _shape(tensors, "convs.0.0.weight", 4)
    widths = {resolution: from_rgb[0]}
    for i in range(num_blocks):
        widths[resolution >> (i + 1)] = _shape(tensors, f"convs.{i + 1}.conv2.1.weight", 4)[0]
    kwargs: dict[str, Any] = {
        "c_dim": 0,
        "img_resolution": resolution,
        "img_channels": from_rgb[1],
        **_channels(widths),
        "block_kwargs": {"resample_filter": _filter(tensors)},
        "epilogue_kwargs": {"mbstd_group_size": _MBSTD_GROUP},
    }
    ours = _renamed(tensors, dict(_discriminator_places(resolution)))
    return with_filters(Description(Discriminator, kwargs, ours))


def _count(tensors: Mapping[str, Any], pattern: str) -> int:
    """How many names match; their numbers need not follow each other, which the names that are missing will tell."""
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)


def _shape(tensors: Mapping[str, StoredTensor], name: str, num_dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"its tensor {name!r} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(f"its tensor {name!r} has shape {list(shape)}, not {num_dims} dimensions")
    return shape


def _channels(widths: Mapping[int, int]) -> dict[str, int]:
    """channel_base and channel_max of a network that is so wide at each resolution."""
    largest = max(widths.values())
    low = max(width * resolution for resolution, width in widths.items())
    usual = [base for base in (32768, 16384) if base >= low]
    for base in (*usual, low):
        if all(min(base // resolution, largest) == width for resolution, width in widths.items()):
            return {"channel_base": base, "channel_max": largest}
    listing = ", ".join(f"{width} at {resolution}x{resolution}" for resolution, width in sorted(widths.items()))
    raise ValueError(f"its widths cannot be built: {cut(listing, 300)} are not min(base // resolution, max)")


def _filter(tensors: Mapping[str, StoredTensor]) -> list[float]:
    """The taps of the one resampling filter that all layers have."""
    kernels = [tensor for name, tensor in tensors.items() if name.endswith(".kernel")]
    expected = upfirdn2d.setup_filter(_FILTER)
    taps: torch.Tensor | None = None
    for kernel in kernels:
        if len(kernel.shape) != 2 or kernel.shape[0] != kernel.shape[1] or not 1 <= kernel.shape[0] <= 32:
            raise ValueError(f"its blur kernels are of shape {list(kernel.shape)}, not small squares")
        value = kernel.tensor().double()
        value = value / value.sum()
        own = value.sum(dim=0)
        if not torch.allclose(torch.outer(own, own), value, atol=1e-5):
            raise ValueError("its blur kernels are not separable, which cannot be built")
        if taps is not None and (taps.shape != own.shape or not torch.allclose(taps, own, atol=1e-5)):
            raise ValueError("its layers have different blur kernels, which cannot be built")
        taps = own
    if taps is None or (len(taps) == 4 and torch.allclose(torch.outer(taps, taps).float(), expected, atol=1e-5)):
        return list(_FILTER)
    return [float(tap) for tap in taps]


def _renamed(tensors: _Tensors, places: Mapping[str, _Place]) -> dict[str, StoredTensor | torch.Tensor]:
    """Tensors under our names, without the ones around their shapes."""
    found: dict[str, StoredTensor | torch.Tensor] = {}
    problems = []
    for name, place in places.items():
        if place.name.endswith(".kernel"):
            continue  # see _filter
        if place.name not in tensors:
            problems.append(f"{place.name!r} is missing")
            continue
        stored = tensors[place.name]
        shape = tuple(stored.shape) or (1,) * (place.before + place.after)  # of a single number either will do
        inner = shape[place.before : len(shape) - place.after]
        if shape != (1,) * place.before + inner + (1,) * place.after:
            problems.append(f"{place.name!r} has shape {list(shape)}")
            continue
        tensor = stored if isinstance(stored, torch.Tensor) else stored.tensor()
        found[name] = tensor.reshape(inner)
    known = {place.name for place in places.values()}
    problems += [f"{cut(name, 80)!r} has no place" for name in tensors if name not in known]
    if problems:
        raise ValueError("its tensors do not fit: " + listed(problems))
    return found


def _noises(places: Mapping[str, _Place], resolution: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = {name: int(name.split(".")[1][1:]) for name in places if name.endswith("noise_const")}
    if resolution > _MAX_DRAWN:
        raise ValueError(
            f"its noise inputs were not stored, and are not drawn for {resolution}x{resolution} pixels: "
            f"more than {_MAX_DRAWN}x{_MAX_DRAWN}"
        )
    return {places[name].name: torch.randn([1, 1, size, size], generator=random) for name, size in sizes.items()}


@torch.no_grad()
def _mean_latent(tensors: _Tensors, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Mean of w over fixed latents: `[w_dim]`."""
    names = {name.removeprefix("mapping."): tensor for name, tensor in tensors.items() if name.startswith("mapping.")}
    if sum(math.prod(tensor.shape) for tensor in names.values()) > _MAX_MAPPING_WEIGHTS:
        raise ValueError("its mapping network is too large")
    options = {"z_dim": kwargs["z_dim"], "c_dim": 0, "w_dim": kwargs["w_dim"], "num_ws": None}
    mapping = build(Description(MappingNetwork, {**options, **kwargs["mapping_kwargs"]}, names))
    latents = torch.randn([_MEAN_LATENTS, kwargs["z_dim"]], generator=torch.Generator().manual_seed(0))
    return torch.stack([mapping(z, None).mean(dim=0) for z in latents.split(1000)]).mean(dim=0)


def _number(stored: object) -> Any:
    """What a tensor of one number holds; anything else as it is."""
    return stored.tensor().item() if isinstance(stored, StoredTensor) and stored.shape in ((), (1,)) else stored


def _generator_places(resolution: int, depth: int) -> Iterator[tuple[str, _Place]]:
    """Name of ours, its place."""
    for i in range(depth):
        yield from _both(f"mapping.fc{i}", f"style.{i + 1}")
    yield "synthesis.b4.const", _Place("input.input", before=1)
    yield from _styled_conv("synthesis.b4", "conv1", "conv1")
    yield from _to_rgb("synthesis.b4", "to_rgb1")
    blocks = [f"synthesis.b{size}" for size in _doubled(8, resolution)]
    for k, block in enumerate(blocks):
        yield from _styled_conv(block, "conv0", f"convs.{2 * k}")
        yield from _styled_conv(block, "conv1", f"convs.{2 * k + 1}")
    for k, block in enumerate(blocks):
        yield from _to_rgb(block, f"to_rgbs.{k}")
    convs = ["synthesis.b4.conv1", *(f"{block}.conv{i}" for block in blocks for i in (0, 1))]
    for i, conv in enumerate(convs):
        yield f"{conv}.noise_const", _Place(f"noises.noise_{i}", before=2)


def _styled_conv(block: str, conv: str, theirs: str) -> Iterator[tuple[str, _Place]]:
    ours = f"{block}.{conv}"
    yield f"{ours}.weight", _Place(f"{theirs}.conv.weight", before=1)
    if conv == "conv0":
        yield f"{ours}.resample_filter", _Place(f"{theirs}.conv.blur.kernel", gain=4)
    yield from _both(f"{ours}.affine", f"{theirs}.conv.modulation")
    yield f"{ours}.noise_strength", _Place(f"{theirs}.noise.weight", before=1)
    yield f"{ours}.bias", _Place(f"{theirs}.activate.bias")


def _to_rgb(block: str, theirs: str) -> Iterator[tuple[str, _Place]]:
    yield f"{block}.torgb.bias", _Place(f"{theirs}.bias", before=1, after=2)
    if theirs != "to_rgb1":
        yield f"{block}.resample_filter", _Place(f"{theirs}.upsample.kernel", gain=4)
    yield f"{block}.torgb.weight", _Place(f"{theirs}.conv.weight", before=1)
    yield from _both(f"{block}.torgb.affine", f"{theirs}.conv.modulation")


def _both(ours: str, theirs: str) -> Iterator[tuple[str, _Place]]:
    yield f"{ours}.weight", _Place(f"{theirs}.weight")
    yield f"{ours}.bias", _Place(f"{theirs}.bias")


def _discriminator_places(resolution: int) -> Iterator[tuple[str, _Place]]:
    sizes = list(_doubled(8, resolution))[::-1]
    yield f"b{resolution}.fromrgb.weight", _Place("convs.0.0.weight")
    yield f"b{resolution}.fromrgb.bias", _Place("convs.0.1.bias")
    for j, size in enumerate(sizes, start=1):
        yield f"b{size}.conv0.weight", _Place(f"convs.{j}.conv1.0.weight")
        yield f"b{size}.conv0.bias", _Place(f"convs.{j}.conv1.1.bias")
        yield f"b{size}.conv1.resample_filter", _Place(f"convs.{j}.conv2.0.kernel")
        yield f"b{size}.conv1.weight", _Place(f"convs.{j}.conv2.1.weight")
        yield f"b{size}.conv1.bias", _Place(f"convs.{j}.conv2.2.bias")
        yield f"b{size}.skip.resample_filter", _Place(f"convs.{j}.skip.0.kernel")
        yield f"b{size}.skip.weight", _Place(f"convs.{j}.skip.1.weight")
    yield "b4.conv.weight", _Place("final_conv.0.weight")
    yield "b4.conv.bias", _Place("final_conv.1.bias")
    yield from _both("b4.fc", "final_linear.0")
    yield from _both("b4.out", "final_linear.1")


def _doubled(first: int, last: int) -> Iterator[int]:
    return itertools.takewhile(lambda size: size <= last, (first << i for i in itertools.count()))


def _obstacles(network: Generator | Discriminator) -> list[str]:
    """Why the layout cannot carry a network."""
    kind = type(network).__name__.lower()
    block: Any = network.synthesis.b4 if isinstance(network, Generator) else network.b4
    height, width = network.img_size
    usual = upfirdn2d.setup_filter(_FILTER)
    filters = [tensor for name, tensor in network.named_buffers() if name.split(".")[-1] == "resample_filter"]
    activations = {layer.activation for layer in network.modules() if hasattr(layer, "activation")} - {"linear"}
    reasons = []
    if network.c_dim > 0:
        reasons.append(f"it has labels of {network.c_dim} numbers")
    if network.img_channels != 3:
        reasons.append(f"its images have {network.img_channels} channels, not 3")
    if not isinstance(network.img_resolution, int) or height < 8:
        reasons.append(f"its images are {width}x{height}, not a square of a power of two from 8 on")
    if block.architecture != ("skip" if isinstance(network, Generator) else "resnet"):
        reasons.append(f"its {kind} has the architecture {block.architecture}")
    if any(f.shape != usual.shape or not torch.allclose(f.cpu().float(), usual, atol=1e-5) for f in filters):
        reasons.append("its resampling filter is not [1, 3, 3, 1]")
    if activations != {"lrelu"}:
        reasons.append(f"the activations of its {kind} are not lrelu alone")
    if isinstance(network, Generator):
        mapping = network.mapping
        layers: list[Any] = [mapping.get_submodule(f"fc{i}") for i in range(mapping.num_layers)]
        outputs = {layer.weight.shape[0] for layer in layers}
        if outputs | {network.z_dim} != {network.w_dim}:
            reasons.append("its latents and mapping layers are not all of one width")
        if mapping.fc0.bias_gain != _LR_MULTIPLIER:
            reasons.append(f"its mapping lr_multiplier is {mapping.fc0.bias_gain}, not {_LR_MULTIPLIER}")
        if not block.conv1.use_noise:
            reasons.append("it has no noise inputs")
    elif block.mbstd is None or block.mbstd.num_channels != 1:
        reasons.append("its discriminator has not one minibatch-stddev channel")
    return reasons


def _losses(network: Generator | Discriminator) -> list[str]:
    """What the layout does not carry and a user can do without."""
    notes = []
    modules: list[Any] = list(network.modules())
    if any(getattr(module, "use_fp16", False) for module in modules):
        notes.append("half precision of some blocks is not stored: all will compute in float32")
    if any(getattr(module, "conv_clamp", None) is not None for module in modules):
        notes.append("the clamp of activations (conv_clamp) is not stored")
    top: Any = network.synthesis if isinstance(network, Generator) else network
    widths = {size: top.get_submodule(f"b{size}").conv1.weight.shape[1] for size in top.block_resolutions}
    own = [{size: min(16384 * m // size, 512) for size in widths} for m in _OWN_MULTIPLIERS]
    if widths not in own:
        notes.append("its widths are not those of channel_multiplier 1 or 2, which the port's own program builds")
    if isinstance(network, Discriminator) and (mbstd := network.b4.mbstd) and mbstd.group_size != _MBSTD_GROUP:
        group = mbstd.group_size or "the whole batch"
        notes.append(f"the discriminator's minibatch-stddev group of {group} becomes {_MBSTD_GROUP}")
    return notes


def without_clamp(network: torch.nn.Module) -> None:
    """Take from a network what changes pictures and the layout does not carry."""
    modules: list[Any] = list(network.modules())
    for module in modules:
        if getattr(module, "conv_clamp", None) is not None:
            module.conv_clamp = None


def _port_tensors(network: Generator | Discriminator, half: bool) -> dict[str, torch.Tensor]:
    ours = network.state_dict()
    resolution = network.img_size[0]
    if isinstance(network, Generator):
        places = _generator_places(resolution, network.mapping.num_layers)
    else:
        places = _discriminator_places(resolution)
    tensors = {}
    for name, place in places:
        tensor = ours[name].detach().cpu().float() * place.gain
        shape = (1,) * place.before + tuple(tensor.shape) + (1,) * place.after
        tensor = tensor.contiguous().reshape(shape)
        tensors[place.name] = halved(tensor) if half else tensor
    return tensors
