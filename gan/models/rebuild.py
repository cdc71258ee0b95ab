"""Make a network of ours from its description, of which everything is checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from gan.image_size import IMAGE_KINDS
from gan.models.description import Description
from gan.models.wording import brief, cut, listed
from torch_utils.safe_pickle import StoredTensor

_MAX_NUMBER = 2**24  # of any constructor argument: keeps the sizes of tensors within 64 bits
_MAX_PIXELS = 2**24  # of an image: a network may hold no tensor of that size, and take gigabytes to draw one
_MAX_TAPS = 64  # of a resampling filter

_Check = tuple[Callable[[Any], bool], str]  # of a value, and what it should be


def _whole(least: int) -> _Check:
    return lambda value: type(value) is int and value >= least, f"a whole number from {least} on"


def _number(low: float, high: float) -> _Check:
    return lambda value: type(value) in (int, float) and low <= value <= high, f"a number from {low:g} to {high:g}"


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check[0](value), f"None or {check[1]}"


_ANY: _Check = (lambda value: True, "")
_SWITCH: _Check = (lambda value: isinstance(value, bool), "True or False")
_OPTIONS: dict[str, _Check] = {  # architecture, activation and the size of images are checked by constructors
    **dict.fromkeys(("z_dim", "c_dim", "num_layers", "num_fp16_res", "freeze_layers", "mbstd_num_channels"), _whole(0)),
    **dict.fromkeys(("w_dim", "channel_base", "channel_max"), _whole(1)),
    **dict.fromkeys(("embed_features", "layer_features", "cmap_dim"), _or_none(_whole(0))),
    **dict.fromkeys(("use_noise", "fp16_channels_last"), _SWITCH),
    "img_channels": (lambda value: type(value) is int and value in IMAGE_KINDS, "1, 3 or 4: grey, RGB, RGBA"),
    "mbstd_group_size": _or_none(_whole(1)),
    "kernel_size": (lambda value: type(value) is int and value > 0 and value % 2 == 1, "an odd whole number"),
    "conv_clamp": _or_none(_number(0, _MAX_NUMBER)),
    "lr_multiplier": _number(1e-6, _MAX_NUMBER),
    "w_avg_beta": _number(0, 1),
    "resample_filter": (
        lambda value: value is None or _is_filter(value),
        f"up to {_MAX_TAPS} numbers to divide by their sum",
    ),
}


def build(description: Description) -> torch.nn.Module:
    """The described network, on the CPU, in evaluation mode, without gradients.

    Raises ValueError if it cannot be built from its options, or if names, shapes or data of its tensors do not fit.
    """
    tensors = description.tensors
    made = outline(description)
    wanted = made.state_dict(keep_vars=True)
    problems = _misfits(tensors, wanted)
    if problems:
        raise ValueError("its tensors do not fit: " + listed(problems))
    stored = {name: _own(tensors[name]) for name in wanted}
    complex_ones = [name for name, tensor in stored.items() if tensor.is_complex()]
    if complex_ones:
        raise ValueError(f"its tensors are not real numbers: {listed(complex_ones)}")
    content = {name: stored[name].to(tensor.dtype) for name, tensor in wanted.items()}
    made.load_state_dict(content, assign=True)
    return made.eval().requires_grad_(False)


def outline(description: Description) -> torch.nn.Module:
    """The described network without its tensors: they are on the meta device, all but the filters.

    Raises ValueError if it cannot be built from its options.
    """
    _check_options(description.kwargs, len(description.tensors))
    try:
        with ShapesOnly():
            made = description.cls(**description.kwargs)
    except MemoryError:
        raise
    except Exception as error:  # hostile options fail in any way there is
        raise ValueError(
            f"it cannot be built from its options ({type(error).__name__}: {cut(str(error), 300)})"
        ) from error
    height, width = getattr(made, "img_size", (1, 1))  # a mapping network has none
    if height * width > _MAX_PIXELS:
        raise ValueError(f"its images of {width}x{height} are too large: more than {_MAX_PIXELS} pixels")
    if any(0 in tensor.shape for tensor in made.state_dict(keep_vars=True).values()):
        raise ValueError("it has layers without channels")
    return made


def with_filters(description: Description) -> Description:
    """The same with the filters that its constructor makes: for formats that store options in place of filters."""
    made = outline(description).state_dict()
    filters = {name: tensor for name, tensor in made.items() if name.split(".")[-1] == "resample_filter"}
    return Description(description.cls, description.kwargs, {**description.tensors, **filters})


class ShapesOnly(TorchFunctionMode):
    """Within it, the tensors that constructors fill with numbers take no memory; filters are real.

    Only `torch.empty` is asked for meta tensors, and nothing is computed with them: other functions of theirs import
    half of PyTorch's compiler, which takes longer than to read the file.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.empty, torch.zeros, torch.ones, torch.full):
            return torch.empty(args[0], dtype=kwargs.get("dtype"), device="meta")
        if func in (torch.Tensor.div, torch.Tensor.__truediv__) and args[0].is_meta:
            return args[0]  # divided by a number
        return func(*args, **kwargs)


def _check_options(kwargs: Mapping[str, Any], num_tensors: int) -> None:
    """Raise ValueError for a value that a constructor takes and the network could not run with."""
    for name, value in kwargs.items():
        if isinstance(value, dict) and name not in _OPTIONS:
            _check_options(value, num_tensors)
            continue
        if any(isinstance(number, (int, float)) and abs(number) > _MAX_NUMBER for number in _elements(value)):
            raise ValueError(f"its option {cut(name, 60)} is too large: {brief(value)}")
        is_sound, words = _OPTIONS.get(name, _ANY)
        if not is_sound(value):
            raise ValueError(f"its option {name} is {brief(value)}, not {words}")
        if name == "num_layers" and value > num_tensors:
            raise ValueError(f"its option num_layers is {value}, but it holds {num_tensors} tensors")


def _is_filter(value: Any) -> bool:
    """Whether these are taps, `[taps]` or `[height, width]`."""
    try:
        taps = np.asarray(value, dtype=np.float32) if isinstance(value, (list, tuple)) else np.zeros(0)
    except (TypeError, ValueError):
        return False
    total = abs(taps.sum())
    return taps.ndim in (1, 2) and 0 < taps.size <= _MAX_TAPS and bool(np.isfinite(total) and total > 0)


def _elements(value: Any) -> Sequence[Any]:
    """Those of a sequence, such as a size; of anything else itself."""
    return value if isinstance(value, (list, tuple)) else (value,)


def _misfits(tensors: Mapping[str, StoredTensor | torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"{name!r} is missing" for name in wanted if name not in tensors]
    problems += [f"{cut(name, 80)!r} has no place" for name in tensors if name not in wanted]
    for name, tensor in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != tuple(tensor.shape):
            problems.append(f"{name!r} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}")
    return problems


def _own(stored: StoredTensor | torch.Tensor) -> torch.Tensor:
    if isinstance(stored, StoredTensor):
        return stored.own()
    return stored.clone(memory_format=torch.contiguous_format)
