"""Snapshot pickles of the TensorFlow generation: a tuple (G, D, Gs) of networks, each options and variables.

A network is an object of the global `dnnlib.tflib.network Network`, which carries its own program as text. That text is
not looked at: names of variables, options and defaults are what the format is made of. Convolutions lie there as
height x width x in x out, matrices as in x out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gan.models import rebuild
from gan.models.description import MAX_TENSORS, Contents, Description
from gan.models.wording import brief, cut, listed
from gan.networks import Discriminator, Generator
from torch_utils import persistence
from torch_utils.safe_pickle import Opaque, StoredArray, check_sizes

NETWORK = "dnnlib.tflib.network.Network"
_OLDEST_VERSION = 4
_MAX_DEPTH = 4  # of components in components
_LONGEST_NAME = 1000  # characters

# What the programs of that time took for options that a file does not mention.
_GENERATOR_DEFAULTS = {
    "latent_size": 512,
    "label_size": 0,
    "dlatent_size": 512,
    "resolution": 1024,
    "num_channels": 3,
    "mapping_layers": 8,
    "label_fmaps": None,
    "mapping_fmaps": None,
    "mapping_nonlinearity": "lrelu",
    "mapping_lrmul": 0.01,
    "w_avg_beta": 0.995,
    "fmap_base": 16384,
    "fmap_max": 512,
    "num_fp16_res": 0,
    "conv_clamp": None,
    "architecture": "skip",
    "resample_kernel": (1, 3, 3, 1),
    "use_noise": True,
    "nonlinearity": "lrelu",
}
_DISCRIMINATOR_DEFAULTS = {
    "label_size": 0,
    "resolution": 1024,
    "num_channels": 3,
    "architecture": "resnet",
    "fmap_base": 16384,
    "fmap_max": 512,
    "num_fp16_res": 0,
    "conv_clamp": None,
    "mapping_fmaps": None,
    "nonlinearity": "lrelu",
    "resample_kernel": (1, 3, 3, 1),
    "freeze_layers": 0,
    "mapping_layers": 0,
    "mapping_lrmul": 0.1,
    "mbstd_group_size": None,
    "mbstd_num_features": 1,
}
_IGNORED = ("truncation_psi", "truncation_cutoff", "style_mixing_prob", "structure")  # how to use it, not what it is
_IGNORED_VARIABLE = "lod"  # where progressive growing was
_OTHER_GENERATIONS = {"G_style": "StyleGAN1", "D_basic": "StyleGAN1", "G_paper": "ProGAN", "D_paper": "ProGAN"}

_Tensor = torch.Tensor
_Change = Callable[[_Tensor], _Tensor]


def is_one(content: object) -> bool:
    """Whether a pickle's content looks like a snapshot of that generation."""
    if not isinstance(content, tuple) or len(content) != 3 or not any(isinstance(part, Opaque) for part in content):
        return False
    return all(part is None or isinstance(part, Opaque) for part in content)


def read(content: tuple[Any, ...]) -> Contents:
    """The networks of a tuple (G, D, Gs), any of which may be None.

    Raises ValueError if they are of another kind, or if options or variables are not those of StyleGAN2.
    """
    found: dict[str, Description] = {}
    notes: list[str] = []
    for name, stored in zip(("G", "D", "G_ema"), content, strict=True):
        if stored is None:
            continue
        try:
            describe = _discriminator if name == "D" else _generator
            found[name] = describe(_checked_state(stored), notes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Contents(kind="snapshot of the TensorFlow generation", networks=found, notes=tuple(dict.fromkeys(notes)))


def _checked_state(stored: Opaque) -> dict[str, Any]:
    if stored.global_name != NETWORK:
        raise ValueError(
            "it looks like a snapshot of the TensorFlow generation, but this is not one of its networks: "
            + repr(cut(stored.global_name, 80))
        )
    state = stored.state
    if not isinstance(state, dict):
        raise ValueError("the state of a network is badly described")
    for name, generation in _OTHER_GENERATIONS.items():
        if state.get("build_func_name") == name:
            raise ValueError(f"it is a {generation} network; only StyleGAN2 networks can be opened")
    version = state.get("version")
    if type(version) is not int or version < _OLDEST_VERSION:
        raise ValueError(f"it has version {brief(version)} of the format; {_OLDEST_VERSION} and newer can be opened")
    return state


def _generator(state: dict[str, Any], notes: list[str]) -> Description:
    variables = _variables(state)
    _refuse_other_generations(variables)
    if not any(name.startswith("mapping/") for name in variables):
        raise ValueError("it has no mapping network: not a StyleGAN2 generator, maybe of ProGAN")
    options = _options(state, _GENERATOR_DEFAULTS)
    if _unify_lods(variables, "ToRGB", options["resolution"]):
        options["architecture"] = "orig"
        notes += _leave_out_lods(variables, "synthesis/", "ToRGB", options["resolution"])
    kwargs = {
        "z_dim": options["latent_size"],
        "c_dim": options["label_size"],
        "w_dim": options["dlatent_size"],
        "img_resolution": options["resolution"],
        "img_channels": options["num_channels"],
        "mapping_kwargs": {
            "num_layers": options["mapping_layers"],
            "embed_features": options["label_fmaps"],
            "layer_features": options["mapping_fmaps"],
            "activation": options["mapping_nonlinearity"],
            "lr_multiplier": options["mapping_lrmul"],
            "w_avg_beta": 1 if options["w_avg_beta"] is None else options["w_avg_beta"],
        },
        "synthesis_kwargs": {
            **_widths(options),
            "num_fp16_res": options["num_fp16_res"],
            "conv_clamp": options["conv_clamp"],
            "architecture": options["architecture"],
            "resample_filter": options["resample_kernel"],
            "use_noise": options["use_noise"],
            "activation": options["nonlinearity"],
        },
    }
    return _with_variables(Generator, kwargs, variables, _generator_source)


def _discriminator(state: dict[str, Any], notes: list[str]) -> Description:
    variables = _variables(state)
    _refuse_other_generations(variables)
    options = _options(state, _DISCRIMINATOR_DEFAULTS)
    if _unify_lods(variables, "FromRGB", options["resolution"]):
        options["architecture"] = "orig"
        notes += _leave_out_lods(variables, "", "FromRGB", options["resolution"])
    mapping = {
        "num_layers": options["mapping_layers"],
        "activation": options["nonlinearity"],
        "lr_multiplier": options["mapping_lrmul"],
    }
    kwargs = {
        "c_dim": options["label_size"],
        "img_resolution": options["resolution"],
        "img_channels": options["num_channels"],
        "architecture": options["architecture"],
        **_widths(options),
        "num_fp16_res": options["num_fp16_res"],
        "conv_clamp": options["conv_clamp"],
        "cmap_dim": options["mapping_fmaps"],
        "block_kwargs": {
            "activation": options["nonlinearity"],
            "resample_filter": options["resample_kernel"],
            "freeze_layers": options["freeze_layers"],
        },
        "mapping_kwargs": mapping if options["label_size"] else {},
        "epilogue_kwargs": {
            "mbstd_group_size": options["mbstd_group_size"],
            "mbstd_num_channels": options["mbstd_num_features"],
            "activation": options["nonlinearity"],
        },
    }
    return _with_variables(Discriminator, kwargs, variables, _discriminator_source)


def _widths(options: Mapping[str, Any]) -> dict[str, int]:
    return {"channel_base": 2 * options["fmap_base"], "channel_max": options["fmap_max"]}


def _options(state: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    stored = persistence.plain(state.get("static_kwargs") or {})
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise ValueError("its options (static_kwargs) are badly described")
    unknown = [f"{cut(name, 60)}={brief(stored[name])}" for name in stored if name not in {*defaults, *_IGNORED}]
    if unknown:
        raise ValueError("options that are not known: " + listed(unknown))
    options = {**defaults, **{name: value for name, value in stored.items() if name in defaults}}
    for name, default in defaults.items():
        if type(default) is int and (type(options[name]) is not int or options[name] < 0):
            raise ValueError(f"its option {name} is {brief(options[name])}, not a whole number")
    return options


def _variables(state: Mapping[str, Any]) -> dict[str, _Tensor]:
    stored = _stored(state)
    check_sizes(value for value in stored.values() if isinstance(value, StoredArray))
    return {name: _tensor(name, value) for name, value in stored.items()}


def _stored(state: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Arrays and numbers of a network and of its components, by path."""
    pairs, components = state.get("variables") or (), state.get("components") or {}
    if not isinstance(pairs, (list, tuple)) or not isinstance(components, dict) or depth > _MAX_DEPTH:
        raise ValueError("its variables or components are badly described")
    if len(pairs) + len(components) > MAX_TENSORS:
        raise ValueError(f"it holds more than {MAX_TENSORS} variables")
    found = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not _is_name(pair[0]):
            raise ValueError("a variable is badly described")
        found[prefix + pair[0]] = pair[1]
    for name, component in components.items():
        if not _is_name(name) or not isinstance(component, Opaque) or not isinstance(component.state, dict):
            raise ValueError("a component is badly described")
        found.update(_stored(component.state, f"{prefix}{name}/", depth + 1))
        if len(found) > MAX_TENSORS:
            raise ValueError(f"it holds more than {MAX_TENSORS} variables")
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def _tensor(name: str, stored: object) -> _Tensor:
    if isinstance(stored, (int, float)):
        return torch.tensor(float(stored))
    try:
        array = np.asarray(stored) if isinstance(stored, StoredArray) else None
    except ValueError:  # text or such
        array = None
    if array is None or array.dtype.kind not in "fiu":
        raise ValueError(f"its variable {cut(name, 80)!r} is not an array of numbers")
    return torch.as_tensor(array.astype(np.float32, copy=False))


def _refuse_other_generations(variables: Mapping[str, _Tensor]) -> None:
    if any("StyleMod/" in name or "InstanceNorm" in name for name in variables):
        raise ValueError("it is a StyleGAN1 network (AdaIN); only StyleGAN2 networks can be opened")
    if "4x4/Dense1/weight" in variables and "Output/weight" not in variables:
        raise ValueError("it is a discriminator of StyleGAN1 or ProGAN; only StyleGAN2 networks can be opened")


def _unify_lods(variables: dict[str, _Tensor], layer: str, resolution: int) -> bool:
    """Rename ToRGB_lod2/bias to 256x256/ToRGB/bias, in place; whether there were such names."""
    pattern = re.compile(rf"(|.*/){layer}_lod(\d{{1,2}})/(\w+)")
    renamed = {name: match for name in variables if (match := pattern.fullmatch(name))}
    for name, match in renamed.items():
        prefix, lod, part = match.groups()
        size = resolution >> int(lod)
        variables.setdefault(f"{prefix}{size}x{size}/{layer}/{part}", variables.pop(name))
    return bool(renamed)


def _leave_out_lods(variables: dict[str, _Tensor], prefix: str, layer: str, resolution: int) -> list[str]:
    """Remove the layers of the smaller images that progressive growing began with."""
    pattern = re.compile(rf"{prefix}(\d+)x\1/{layer}/\w+")
    small = [name for name in variables if (match := pattern.fullmatch(name)) and int(match[1]) != resolution]
    for name in small:
        del variables[name]
    text = f"the {layer} layers below {resolution}x{resolution}, which only progressive growing used, are left out"
    return [text] if small else []


def _with_variables(
    cls: type[torch.nn.Module],
    kwargs: dict[str, Any],
    variables: dict[str, _Tensor],
    source_of: Callable[[str], tuple[str, _Change]],
) -> Description:
    """`source_of`: name of ours -> the variable that it is made of, and how."""
    outline = rebuild.outline(Description(cls, kwargs, variables))
    tensors: dict[str, _Tensor] = {}
    used, missing = set(), []
    for name, tensor in outline.state_dict().items():
        if name.split(".")[-1] == "resample_filter":
            tensors[name] = tensor
            continue
        source, change = source_of(name)
        if source not in variables:
            missing.append(source)
            continue
        used.add(source)
        try:
            tensors[name] = change(variables[source])
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"its variable {source!r} has shape {list(variables[source].shape)}") from error
    unknown = [name for name in variables if name not in used and name.split("/")[-1] != _IGNORED_VARIABLE]
    problems = [f"{source!r} is missing" for source in missing]
    problems += [f"{cut(name, 80)!r} has no place" for name in unknown]
    if problems:
        raise ValueError("its variables do not fit: " + listed(problems))
    return Description(cls, kwargs, tensors)


def _generator_source(name: str) -> tuple[str, _Change]:
    part, *path = name.split(".")
    if part == "mapping":
        return _dense(path, {"w_avg": "dlatent_avg"}, "mapping/LabelEmbed", "mapping/Dense")
    size = int(path[0][1:])
    if path[1] == "const":
        return "synthesis/4x4/Const/const", lambda const: const.reshape(const.shape[1:])
    layer, kind = path[1], ".".join(path[2:])
    if kind == "noise_const":
        level = size.bit_length() - 1
        number = 0 if size == 4 else 2 * level - (5 if layer == "conv0" else 4)
        return f"synthesis/noise{number}", lambda noise: noise[0, 0]
    folder = {"conv0": "Conv0_up", "conv1": "Conv" if size == 4 else "Conv1", "torgb": "ToRGB", "skip": "Skip"}[layer]
    changes: dict[str, tuple[str, _Change]] = {
        "weight": ("weight", _flipped_kernel if layer in ("conv0", "skip") else _kernel),
        "bias": ("bias", _same),
        "noise_strength": ("noise_strength", _same),
        "affine.weight": ("mod_weight", _matrix),
        "affine.bias": ("mod_bias", lambda bias: bias + 1),
    }
    variable, change = changes[kind]
    return f"synthesis/{size}x{size}/{folder}/{variable}", change


def _discriminator_source(name: str) -> tuple[str, _Change]:
    part, *path = name.split(".")
    if part == "mapping":
        return _dense(path, {}, "LabelEmbed", "Mapping")
    if part == "b4" and path[0] in ("fc", "out"):
        return {"fc": "4x4/Dense0/", "out": "Output/"}[path[0]] + path[1], _matrix if path[1] == "weight" else _same
    size = int(part[1:])
    folders = {"fromrgb": "FromRGB", "conv": "Conv", "conv0": "Conv0", "conv1": "Conv1_down", "skip": "Skip"}
    return f"{size}x{size}/{folders[path[0]]}/{path[1]}", _kernel if path[1] == "weight" else _same


def _dense(path: list[str], others: dict[str, str], embed: str, layer: str) -> tuple[str, _Change]:
    if path[0] in others:
        return others[path[0]], _same
    folder = embed if path[0] == "embed" else f"{layer}{path[0].removeprefix('fc')}"
    return f"{folder}/{path[1]}", _matrix if path[1] == "weight" else _same


def _same(tensor: _Tensor) -> _Tensor:
    return tensor


def _matrix(tensor: _Tensor) -> _Tensor:
    return tensor.permute(1, 0)


def _kernel(tensor: _Tensor) -> _Tensor:
    return tensor.permute(3, 2, 0, 1)


def _flipped_kernel(tensor: _Tensor) -> _Tensor:
    return _kernel(tensor).flip(2, 3)
