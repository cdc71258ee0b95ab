"""Everything that survives a restart."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch

from gan import schedule
from gan.augment import AugmentPipe
from gan.config import TrainConfig
from gan.networks import Discriminator, Generator, forget_weights, prepare_weights, set_half_dtype
from gan.training.gradients import FlatGradients
from torch_utils.stats import Stats


@dataclasses.dataclass
class Progress:
    """Where a run is. `nimg` is the only clock: data order, random numbers and schedules derive from it."""

    nimg: int = 0
    """images shown so far"""
    tick: int = 0
    """ticks completed"""
    tick_nimg: int = 0
    """nimg at the end of the last tick"""
    tick_start_seconds: float = 0.0
    """when this tick began, in seconds spent on the run"""
    maintenance_seconds: float = 0.0
    """what writing files took at the end of the last tick"""
    seconds: float = 0.0
    """time spent on the run when the state was saved, over all its starts"""
    branch: int = 0
    """number of the folder that was made when the run last went back to an older state; 0: it never did"""
    rollbacks: int = 0
    """how many times it went back by itself, after a failure"""


class TrainingState:
    """Networks, optimisers, augmentation and counters of a run.

    What must survive a restart is in `state_dict`; what is not there is not state. Random numbers are seeded by nimg.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(config.seed)
        self.G = Generator(**config.network.generator_kwargs(config.data)).train().requires_grad_(False).to(device)
        self.D = Discriminator(**config.network.discriminator_kwargs(config.data)).train()
        self.D.requires_grad_(False).to(device)
        if device.type == "cpu":  # the layout of all convolutions there, and so of the gradients of their weights
            for network in (self.G, self.D):
                torch.nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.G_ema = copy.deepcopy(self.G).eval()
        self.augment = None
        if config.augment.multipliers is not None:
            multipliers: dict[str, Any] = dict(config.augment.multipliers)
            self.augment = AugmentPipe(**multipliers).requires_grad_(False).to(device)
            self.augment.p.fill_(config.augment.initial_p)
        optim = config.optim
        self.G_opt = _adam(self.G, optim.glr, optim.betas, optim.eps, optim.g_reg_interval)
        self.D_opt = _adam(self.D, optim.dlr, optim.betas, optim.eps, optim.d_reg_interval)
        room = {"w_mean": self.G.w_dim, "pl_mean": 1, "ada_signs": 2}  # what the ranks average beside the gradients
        self.G_grads, self.D_grads = (FlatGradients(net.parameters(), room) for net in (self.G, self.D))
        self.pl_mean = torch.zeros([], device=device)
        self.ada_signs = torch.zeros([2], device=device)  # sum and number since p was last adjusted
        self.stats = Stats(device)
        self.progress = Progress()

    @property
    def p(self) -> torch.Tensor:
        """Augmentation probability `[]`, on the device."""
        return self.augment.p if self.augment is not None else torch.zeros([])

    def set_half_dtype(self, dtype: torch.dtype) -> None:
        """What the high resolutions of all networks compute in."""
        for network in (self.G, self.D, self.G_ema):
            set_half_dtype(network, dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What all processes of a run have in common to the bit after each step, by name; the live ones."""
        tensors = {"augment_p": self.p}
        for prefix, network in (("G", self.G), ("D", self.D), ("G_ema", self.G_ema)):
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in network.state_dict().items()}
        return tensors

    def copy_networks(self) -> dict[str, Any]:
        """G, D, G_ema and augment_pipe (None: no augmentation) as they are now, for what takes its time with them."""
        parts = {"G": self.G, "D": self.D, "G_ema": self.G_ema, "augment_pipe": self.augment}
        copies = {name: copy.deepcopy(part) for name, part in parts.items()}
        for name in ("G", "D"):
            forget_weights(copies[name])  # type: ignore[arg-type]
        return copies

    def copy(self, networks: dict[str, Any] | None = None) -> dict[str, Any]:
        """A `state_dict` of its own; `networks`: their copies of this moment, which it then shares."""
        if networks is None:
            return clone(self.state_dict())
        shared = ("G", "D", "G_ema")
        own = clone({name: value for name, value in self.state_dict().items() if name not in shared})
        return {**own, **{name: networks[name].state_dict() for name in shared}}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: loads with weights_only. The tensors are the live ones."""
        return {
            "G": self.G.state_dict(),
            "D": self.D.state_dict(),
            "G_ema": self.G_ema.state_dict(),
            "G_opt": self.G_opt.state_dict(),
            "D_opt": self.D_opt.state_dict(),
            "augment_p": self.p,
            "ada_signs": self.ada_signs,
            "pl_mean": self.pl_mean,
            "stats": self.stats.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; before the first step, as recorded phases would not see it."""
        for name in ("G", "D", "G_ema", "G_opt", "D_opt", "stats"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.G_opt, self.D_opt):
            _adopt_moments(optimizer, capturable=self.device.type == "cuda")
        prepare_weights(self.G)  # a TrainStep may have prepared other values
        prepare_weights(self.D)
        if self.augment is not None:
            self.augment.p.copy_(state["augment_p"])
        self.ada_signs.copy_(state["ada_signs"])
        self.pl_mean.copy_(state["pl_mean"])
        self.progress = Progress(**state["progress"])


def _adopt_moments(optimizer: torch.optim.Optimizer, capturable: bool) -> None:
    """Make a loaded optimiser one of this device: the state may have been saved on another.

    Fused optimisers take for granted that moments have the memory layout of their parameters.
    """
    for group in optimizer.param_groups:
        group["capturable"] = capturable
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


def _adam(
    network: torch.nn.Module, lr: float, betas: tuple[float, float], eps: float, reg_interval: int
) -> torch.optim.Adam:
    lr, betas = schedule.lazy_adam(lr, betas, reg_interval)
    on_cuda = next(network.parameters()).device.type == "cuda"
    return EagerAdam(network.parameters(), lr=lr, betas=betas, eps=eps, fused=True, capturable=on_cuda)


class EagerAdam(torch.optim.Adam):
    """Adam without what wraps its methods for torch.compile: that imports torch._dynamo, a second of every start."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    _unwrapped_step = inspect.unwrap(torch.optim.Adam.step)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        return self._unwrapped_step(closure)


def clone(value: Any) -> Any:
    """Nested dicts, lists and tuples with a copy of every tensor, on its device."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(clone(item) for item in value)
    return value
