"""Make a network of ours from its description: class, constructor arguments, tensors. All is checked before it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gan.models.description import Description
from torch_utils.safe_pickle import StoredTensor, check_sizes

MAX_TENSORS = 4096  # of a network
_MAX_NUMBER = 2**24  # of any constructor argument: keeps the sizes of tensors within 64 bits
_NAMED = 12  # misfits that an error spells out

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict = 2, 8, 8, 8


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
    check_sizes(tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor))
    stored = {name: _own(tensors[name]) for name in wanted}
    if any(tensor.is_complex() for tensor in stored.values()):
        raise ValueError("its tensors are not real numbers")
    content = {name: stored[name].to(tensor.dtype) for name, tensor in wanted.items()}
    made.load_state_dict(content, assign=True)
    return made.eval().requires_grad_(False)


def outline(description: Description) -> torch.nn.Module:
    """The described network without its tensors: they are on the meta device, all but the filters.

    Raises ValueError if it cannot be built from its options.
    """
    _check_numbers(description.kwargs, len(description.tensors))
    try:
        with ShapesOnly():
            return description.cls(**description.kwargs)
    except Exception as error:  # hostile options fail in any way there is
        raise ValueError(
            f"it cannot be built from its options ({type(error).__name__}: {cut(str(error), 300)})"
        ) from error


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


def brief(value: object) -> str:
    """`repr` of what a file holds, in bounded time and length, however deeply it is nested."""
    try:
        return cut(_repr.repr(value), 120)
    except ValueError:  # whole numbers of thousands of digits are not written out
        return f"a {type(value).__name__}"


def cut(text: str, length: int) -> str:
    """One printable line of text out of a file, of at most `length` characters and an ellipsis."""
    line = "".join(char if char.isprintable() else " " for char in text[: length + 1])
    return line if len(line) <= length else line[:length] + "..."


def listed(problems: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(problems) - _NAMED
    return "; ".join(problems[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _check_numbers(kwargs: Mapping[str, Any], num_tensors: int) -> None:
    for name, value in kwargs.items():
        if isinstance(value, dict):
            _check_numbers(value, num_tensors)
        elif any(isinstance(number, (int, float)) and abs(number) > _MAX_NUMBER for number in _elements(value)):
            raise ValueError(f"its option {cut(name, 60)} is too large: {brief(value)}")
        elif name == "num_layers" and isinstance(value, int) and value > num_tensors:
            raise ValueError(f"its option num_layers is {value}, but it holds {num_tensors} tensors")


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
