"""One step of training: every due phase, the moving average, the augmentation strength.

The step prints nothing, opens no file and never reads from the device; its shapes do not depend on the data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gan import loss, schedule
from gan.config import TrainConfig
from gan.data.labels import LabelTable
from gan.loss import Latents, PhaseOutput
from gan.networks import forget_weights, prepare_weights
from gan.training.devices import choose_graphs
from gan.training.gradients import FlatGradients
from gan.training.graphs import PhaseGraphs
from gan.training.micro_batch import MicroBatch, random_state, release_memory, restore_random_state
from gan.training.state import TrainingState
from gan.training.timing import PhaseTimer
from torch_utils import draws
from torch_utils.world import ALONE, World

Compute = Callable[[Latents, torch.Tensor, torch.Tensor], PhaseOutput]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A loss that trains one network every `interval` batches."""

    name: str
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    gradients: FlatGradients
    interval: int
    compute: Compute
    """(latents, real images, real labels) -> PhaseOutput"""
    moves: Sequence[str] = ()
    """what else it moves on, by the mean of all ranks: names in `gradients.room`"""
    shrink: int = 1
    """divisor of the number of latents"""


class TrainStep:
    """Trains on a batch at a time, and advances the state's counter.

    A batch is dealt over the ranks and, on each, over rounds: parts of a batch, each of which draws random numbers for
    the whole of it and keeps its own. What is learned does not depend on how it is dealt, up to the order of sums.

    Args:
        report: takes a line for people.
        on_smaller: is told the new number of images at a time when memory ran out, and the step goes on with it; None:
            that it ran out is an error.
        world: the processes that train together; each calls its own step with its share of the batch.
    """

    def __init__(
        self,
        state: TrainingState,
        config: TrainConfig,
        labels: LabelTable,
        report: Callable[[str], None] = print,
        on_smaller: Callable[[int], None] | None = None,
        world: World = ALONE,
    ) -> None:
        self.state, self.config, self.labels, self._world = state, config, labels, world
        self.timer = PhaseTimer(state.device)
        self.graphs = None
        if choose_graphs(config.cuda_graphs, state.device):
            self.graphs = PhaseGraphs(state.device, self._without_graphs, required=config.cuda_graphs == "on")
        self._report = report
        self._micro_batch = MicroBatch(config, state.device, report, on_smaller)
        self.phases = make_phases(state, config)
        for network in (state.G, state.D):
            prepare_weights(network)
        self._ema = (list(state.G_ema.parameters()), list(state.G.parameters()))

    def __call__(self, images: torch.Tensor, indices: torch.Tensor) -> None:
        """Images uint8 `[share, C, H, W]` and their places in the dataset `[share]`, on the device.

        Of a batch, rank r has images r, r + ranks, ...
        """
        progress, batch = self.state.progress, self.config.batch_size
        batch_index = progress.nimg // batch
        torch.manual_seed(schedule.step_seed(self.config.seed, progress.nimg))
        real, real_c = images.to(torch.float32) / 127.5 - 1, self.labels.take(indices)
        if self.graphs is not None:
            real, real_c = self.graphs.inputs(real, real_c)
        for phase in self.phases:
            if schedule.is_due(batch_index, phase.interval):
                with self.timer(phase.name):
                    self._train(phase, real, real_c)
        progress.nimg += batch
        self._update_ema()
        if schedule.is_due(batch_index + 1, self.config.augment.ada_interval):
            self._adjust_augment()

    @property
    def batch_gpu(self) -> int:
        """Images at a time: those of the configuration, or fewer since memory ran out."""
        return self._micro_batch.size

    def give_way(self) -> None:
        """Memory is short beside the step: give back what is not in use, recorded phases included."""
        if self.graphs is not None and self.graphs.gives_way():
            self.graphs.forget()
        release_memory(self.state.device)

    def _train(self, phase: Phase, real: torch.Tensor, real_c: torch.Tensor) -> None:
        """Take one Adam step on the gradients of the whole batch.

        What waits for other processes cannot be recorded: with several, it stands between two recordings.
        """
        if self._world.size == 1:
            self._perform(phase.name, functools.partial(self._run, phase, real, real_c))
            return
        self._perform(phase.name, functools.partial(self._collect, phase, real, real_c))
        with self.timer("reduce"):
            self._world.average(phase.gradients.whole, f"the gradients of {phase.name}")
        self._perform(f"{phase.name} update", functools.partial(self._update, phase))

    def _perform(self, name: str, work: Callable[[], None]) -> None:
        if self.graphs is None:
            work()
        else:
            self.graphs.run(name, work)

    def _run(self, phase: Phase, real: torch.Tensor, real_c: torch.Tensor) -> None:
        """Everything of a phase, in a world of one."""
        self._collect(phase, real, real_c)
        self._update(phase)

    def _collect(self, phase: Phase, real: torch.Tensor, real_c: torch.Tensor) -> None:
        """The gradients of this rank's share, and what else the ranks average."""
        accumulate = functools.partial(self._accumulate, phase, real, real_c)
        outputs = self._micro_batch.fitting(phase.name, accumulate, self.graphs)
        phase.network.requires_grad_(False)
        for output in outputs:
            self.state.stats.report_all(output.stats)
        for name in phase.moves:
            phase.gradients.room[name].copy_(_mean(name, outputs))

    def _update(self, phase: Phase) -> None:
        """One Adam step on gradients that are the same on all ranks, and so are parameters after it."""
        bad = phase.gradients.guard()
        if self._world.is_first:  # the others would say the same again
            self.state.stats.report("Health/nonfinite_gradients", bad)
        with self._micro_batch.whatever_its_size(f"the optimiser after {phase.name}"):
            phase.optimizer.step()
            # What was recorded goes on reading the memory that it read then.
            prepare_weights(phase.network, in_place=self.graphs is not None)
        self._remember(phase)

    def _accumulate(self, phase: Phase, real: torch.Tensor, real_c: torch.Tensor, batch_gpu: int) -> list[PhaseOutput]:
        """Gradients summed over rounds, so that they equal the big batch's. Changes nothing but gradients.

        Each round begins with the random state of the first, but for phases that are or will be recorded, in which the
        stream cannot be set back: there rounds go on in it.
        """
        rounds = len(real) // batch_gpu
        parts = self._world.size * rounds
        latents = self._draw(parts * max(batch_gpu // phase.shrink, 1))
        random = random_state(self.state.device) if rounds > 1 and self.graphs is None else None
        phase.gradients.zero()
        phase.network.requires_grad_(True)
        outputs = []
        for i in range(rounds):
            if i > 0 and random is not None:
                restore_random_state(self.state.device, random)
            index = self._world.rank + i * self._world.size
            with draws.part(index, parts):
                output = phase.compute(latents.every(index, parts), real[i::rounds], real_c[i::rounds])
            (output.loss * (phase.interval / rounds)).backward()
            outputs.append(output)
        return outputs

    def _without_graphs(self, reason: str) -> None:
        """Recording failed half-way: what was prepared in it was only written down."""
        forget_weights(self.state.G)
        forget_weights(self.state.D)
        self.graphs = None
        self._report(reason)

    def _draw(self, n: int) -> Latents:
        G, mixing = self.state.G, self.config.loss.style_mixing_prob
        return Latents.draw(n, G.z_dim, G.num_ws, self.labels.draw(n), mixing)

    @torch.no_grad()
    def _remember(self, phase: Phase) -> None:
        """Move the running means by what all parts of the batch saw."""
        state, room, world = self.state, phase.gradients.room, self._world
        if "w_mean" in phase.moves:
            state.G.mapping.track_w_avg(room["w_mean"])
        if "pl_mean" in phase.moves:
            state.pl_mean.copy_(room["pl_mean"][0])
        if "ada_signs" in phase.moves:
            # Sums of whole numbers, of which the reduction has made a mean.
            state.ada_signs += room["ada_signs"] if world.size == 1 else (room["ada_signs"] * world.size).round()

    @torch.no_grad()
    def _update_ema(self) -> None:
        optim, state = self.config.optim, self.state
        nimg, batch = state.progress.nimg, self.config.batch_size
        beta = schedule.ema_beta(batch, optim.ema_kimg, nimg, optim.ema_rampup)
        get_ema_multi_avg_fn(beta)(*self._ema, 0)
        state.G_ema.mapping.w_avg.copy_(state.G.mapping.w_avg)  # the other buffers never change

    @torch.no_grad()
    def _adjust_augment(self) -> None:
        """One adjustment of p by the ADA controller."""
        state, augment = self.state, self.config.augment
        if state.augment is None or augment.target is None:
            return
        move = schedule.ada_step(self.config.batch_size, augment.ada_interval, augment.ada_kimg)
        total, count = state.ada_signs.unbind()
        state.augment.p.copy_(schedule.adjusted_p(state.augment.p, total, count, augment.target, move, augment.p_max))
        state.ada_signs.zero_()


def make_phases(state: TrainingState, config: TrainConfig) -> list[Phase]:
    """The phases of a batch in their order: G main, G path length, D main, D R1. A phase without weight is left out."""
    G, D, weights = state.G, state.D, config.loss
    augment = state.augment if state.augment is not None else _identity

    def g_main(latents: Latents, real: torch.Tensor, real_c: torch.Tensor) -> PhaseOutput:
        return loss.generator_main(G, D, augment, latents)

    def g_reg(latents: Latents, real: torch.Tensor, real_c: torch.Tensor) -> PhaseOutput:
        return loss.path_length(G, latents, state.pl_mean, weights.pl_weight, weights.pl_decay)

    def d_main(latents: Latents, real: torch.Tensor, real_c: torch.Tensor) -> PhaseOutput:
        return loss.discriminator_main(G, D, augment, latents, real, real_c)

    def d_reg(latents: Latents, real: torch.Tensor, real_c: torch.Tensor) -> PhaseOutput:
        return loss.r1(D, augment, real, real_c, weights.r1_gamma)

    g = (G, state.G_opt, state.G_grads)
    d = (D, state.D_opt, state.D_grads)
    parts = {
        "Gmain": (*g, g_main, ["w_mean"], 1),
        "Greg": (*g, g_reg, ["w_mean", "pl_mean"], weights.pl_batch_shrink),
        "Dmain": (*d, d_main, ["w_mean", "ada_signs"], 1),
        "Dreg": (*d, d_reg, ["ada_signs"], 1),
    }
    phases = []
    for name, interval in config.phase_intervals().items():
        network, optimizer, gradients, compute, moves, shrink = parts[name]
        phases.append(Phase(name, network, optimizer, gradients, interval, compute, moves, shrink))
    return phases


@torch.no_grad()
def _mean(name: str, outputs: Sequence[PhaseOutput]) -> torch.Tensor:
    """What the rounds of a phase say about something that it moves on, together: `[elements]`; ADA's signs summed."""
    if name == "ada_signs":
        signs = torch.cat([output.stats["Loss/signs/real"].flatten() for output in outputs])
        return torch.stack([signs.sum(), torch.ones_like(signs).sum()])
    return torch.stack([getattr(output, name) for output in outputs]).mean(dim=0)


def _identity(images: torch.Tensor) -> torch.Tensor:
    return images
