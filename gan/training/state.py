"""Everything that survives a restart."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from gan import schedule
from gan.augment import AugmentPipe
from gan.config import TrainConfig
from gan.errors import GanError
from gan.files import atomic_path
from gan.networks import Discriminator, Generator
from gan.training.gradients import FlatGradients
from torch_utils.stats import Stats

_FORMAT = 1


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
        self.G_ema = copy.deepcopy(self.G).eval()
        self.augment = None
        if config.augment.multipliers is not None:
            multipliers: dict[str, Any] = dict(config.augment.multipliers)
            self.augment = AugmentPipe(**multipliers).requires_grad_(False).to(device)
            self.augment.p.fill_(config.augment.initial_p)
        optim = config.optim
        self.G_opt = _adam(self.G, optim.glr, optim.betas, optim.eps, optim.g_reg_interval)
        self.D_opt = _adam(self.D, optim.dlr, optim.betas, optim.eps, optim.d_reg_interval)
        self.G_grads, self.D_grads = FlatGradients(self.G.parameters()), FlatGradients(self.D.parameters())
        self.pl_mean = torch.zeros([], device=device)
        self.ada_signs = torch.zeros([2], device=device)  # sum and number since p was last adjusted
        self.stats = Stats(device)
        self.progress = Progress()

    @property
    def p(self) -> torch.Tensor:
        """Augmentation probability `[]`, on the device."""
        return self.augment.p if self.augment is not None else torch.zeros([])

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: loads with weights_only."""
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
        """Take over what `state_dict` gave."""
        for name in ("G", "D", "G_ema", "G_opt", "D_opt", "stats"):
            getattr(self, name).load_state_dict(state[name])
        if self.augment is not None:
            self.augment.p.copy_(state["augment_p"])
        self.ada_signs.copy_(state["ada_signs"])
        self.pl_mean.copy_(state["pl_mean"])
        self.progress = Progress(**state["progress"])


def _adam(
    network: torch.nn.Module, lr: float, betas: tuple[float, float], eps: float, reg_interval: int
) -> torch.optim.Adam:
    lr, betas = schedule.lazy_adam(lr, betas, reg_interval)
    return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, eps=eps, fused=True)


def save_state(path: Path, state: TrainingState, tracker: dict[str, Any]) -> None:
    """Write the training state atomically; `tracker` holds plain values of the tracking."""
    content = io.BytesIO()  # torch.save to a full disk says nothing of a disk; writing bytes does
    torch.save({"format": _FORMAT, "state": state.state_dict(), "tracker": tracker}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU, nothing executed. Raises GanError naming the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise GanError(f"{path}: no such file; the run was stopped before its first save, start it anew") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise GanError(f"{path}: damaged or not a training state ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise GanError(f"{path}: not a training state that this version can continue")
    return content
