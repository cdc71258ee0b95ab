"""Make a network of ours from what a snapshot says of it: class name, constructor arguments, tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gan.networks import Generator
from torch_utils import persistence
from torch_utils.persistence import PersistentObject
from torch_utils.safe_pickle import StoredTensor

# Defaults of the successor project's stylegan2 config, whose generator takes the synthesis options directly.
_SUCCESSOR_NETWORK = {"num_fp16_res": 4, "conv_clamp": 256}
_SUCCESSOR_MAPPING = {"w_avg_beta": 0.998}
_OPTIONS_WITHOUT_EFFECT = ("fused_modconv_default",)  # how to compute, not what
_MAX_TENSORS = 4096
_MAX_NUMBER = 2**24  # of any constructor argument: keeps the sizes of tensors within 64 bits


def network(stored: object, cls: type[torch.nn.Module], successor: bool = False) -> torch.nn.Module:
    """A network with the stored tensors, on the CPU, in evaluation mode, without gradients.

    Args:
        stored: what the file has in its place.
        successor: unstated options have the defaults of the successor's stylegan2 config.

    Raises ValueError if it is another network, its options are not known, or names or shapes of tensors do not fit.
    """
    if not isinstance(stored, PersistentObject) or stored.class_name != cls.__name__:
        raise ValueError(f"it is not a {cls.__name__}, but {_describe(stored)}")
    tensors = stored_tensors(stored)
    kwargs = _constructor_arguments(stored, cls, successor)
    _check_numbers(kwargs, len(tensors))
    try:
        with ShapesOnly():
            made = cls(**kwargs)
    except Exception as error:  # hostile options fail in any way there is
        raise ValueError(f"it cannot be built from its options ({type(error).__name__}: {error})") from error
    wanted = made.state_dict(keep_vars=True)
    problems = _misfits(tensors, wanted)
    if problems:
        raise ValueError("its tensors do not fit: " + "; ".join(problems))
    content = {name: tensors[name].tensor().to(tensor.dtype, copy=True) for name, tensor in wanted.items()}
    made.load_state_dict({name: tensor.contiguous() for name, tensor in content.items()}, assign=True)
    return made.eval().requires_grad_(False)


def is_successor(stored: object) -> bool:
    """Whether this is a generator that was given its synthesis options directly."""
    if not isinstance(stored, PersistentObject) or stored.class_name != Generator.__name__:
        return False
    return bool(_arguments(stored, Generator).keys() - set(_parameters(Generator)))


def stored_tensors(stored: object) -> dict[str, StoredTensor]:
    """Parameters and buffers by dotted name, as in `state_dict`. Raises ValueError if `stored` is not a module."""
    tensors: dict[str, StoredTensor] = {}
    pending, seen = [("", stored)], 0
    while pending:
        prefix, module = pending.pop()
        seen += 1
        if not isinstance(module, PersistentObject):
            raise ValueError(f"{prefix[:-1]!r} is not a module, but {_describe(module)}")
        if module.class_name == "SynthesisInput":
            raise ValueError("it is an alias-free (StyleGAN3) generator; only StyleGAN2 networks can be opened")
        hidden = module.state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple)) else ()
        for name, tensor in [*_items(module, "_parameters"), *_items(module, "_buffers")]:
            if not isinstance(tensor, StoredTensor):
                raise ValueError(f"{prefix + name!r} is not a tensor, but {_describe(tensor)}")
            if name not in hidden:
                tensors[prefix + name] = tensor
        pending += [(f"{prefix}{name}.", child) for name, child in _items(module, "_modules")]
        if len(tensors) + seen + len(pending) > _MAX_TENSORS:
            raise ValueError(f"it holds more than {_MAX_TENSORS} modules and tensors")
    return tensors


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


def _items(module: PersistentObject, key: str) -> list[tuple[str, Any]]:
    values = module.state.get(key) or {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{key} of a {module.class_name} is badly described")
    return [(name, value) for name, value in values.items() if value is not None]


def _arguments(stored: PersistentObject, cls: type) -> dict[str, Any]:
    """The arguments of the recorded constructor call, by name."""
    positional = persistence.plain(stored.state.get("_init_args") or ())
    named = persistence.plain(stored.state.get("_init_kwargs") or {})
    names = _parameters(cls)
    sound = isinstance(positional, (list, tuple)) and isinstance(named, dict) and len(positional) <= len(names)
    if not sound or not all(isinstance(name, str) for name in named):
        raise ValueError("the arguments of its constructor are badly described")
    return {**dict(zip(names, positional, strict=False)), **named}


def _constructor_arguments(stored: PersistentObject, cls: type, successor: bool) -> dict[str, Any]:
    """What to call our class with."""
    kwargs = _arguments(stored, cls)
    for name in [name for name in kwargs if name.endswith("_kwargs")]:
        if not isinstance(kwargs[name], (dict, type(None))):
            raise ValueError(f"its option {name} is not a dict, but {_describe(kwargs[name])}")
        kwargs[name] = dict(kwargs[name] or {})
    if successor and cls is Generator:
        names = _parameters(cls)
        direct = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        kwargs["synthesis_kwargs"] = {**_SUCCESSOR_NETWORK, **kwargs.get("synthesis_kwargs", {}), **direct}
        kwargs["mapping_kwargs"] = {**_SUCCESSOR_MAPPING, **kwargs.get("mapping_kwargs", {})}
    elif successor:
        kwargs = {**_SUCCESSOR_NETWORK, **kwargs}
    for options in (kwargs.get("synthesis_kwargs", {}), kwargs.get("block_kwargs", {})):
        for name in _OPTIONS_WITHOUT_EFFECT:
            options.pop(name, None)
    return kwargs


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]


def _check_numbers(kwargs: Mapping[str, Any], num_tensors: int) -> None:
    for name, value in kwargs.items():
        if isinstance(value, dict):
            _check_numbers(value, num_tensors)
        elif any(isinstance(number, (int, float)) and abs(number) > _MAX_NUMBER for number in _elements(value)):
            raise ValueError(f"its option {name} is too large: {value}")
        elif name == "num_layers" and isinstance(value, int) and value > num_tensors:
            raise ValueError(f"its option num_layers is {value}, but it holds {num_tensors} tensors")


def _elements(value: Any) -> Sequence[Any]:
    """Those of a sequence, such as a size; of anything else itself."""
    return value if isinstance(value, (list, tuple)) else (value,)


def _misfits(tensors: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"{name!r} is missing" for name in wanted if name not in tensors]
    problems += [f"{name!r} has no place" for name in tensors if name not in wanted]
    for name, tensor in wanted.items():
        if name in tensors and tensors[name].shape != tuple(tensor.shape):
            problems.append(f"{name!r} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}")
    return problems


def _describe(stored: object) -> str:
    if isinstance(stored, PersistentObject):
        return f"a {stored.class_name!r}"
    return f"{getattr(stored, 'global_name', type(stored).__name__)!r}"
