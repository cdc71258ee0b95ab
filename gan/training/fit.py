"""`--batch-gpu auto`: the largest micro-batch that fits, found by trial on a GPU, elsewhere by an estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from gan.config import TrainConfig, usable_batch_gpu
from gan.data import cache
from gan.data.dataset import ImageDataset
from gan.data.labels import LabelTable
from gan.memory import available_bytes
from gan.training.grid import FakesSheet
from gan.training.micro_batch import at_a_time, groups_note, is_out_of_memory, release_memory
from gan.training.plan import MemoryEstimate
from gan.training.state import TrainingState
from gan.training.step import TrainStep
from torch_utils.distributed import Place
from torch_utils.world import ALONE, World

# Of the free memory. The estimate is within 25 %, and 0.7 x 1.25 leaves an eighth: to the system's cache of the images,
# and to whatever else runs on the machine.
_SHARE = 0.7


def fitted(
    config: TrainConfig, device: torch.device, half_dtype: torch.dtype, dataset: ImageDataset, world: World = ALONE
) -> tuple[TrainConfig, str | None]:
    """The configuration with the micro-batch that was asked to be found, and a line for people.

    Each rank finds what fits where it is; all take the smallest. Nothing stays on the device. Networks are made on the
    way, which draws random numbers: seed afterwards.
    """
    if not config.fit_batch_gpu:
        return config, None
    world.doing("looking for a --batch-gpu that fits")
    if device.type == "cuda":
        on_device = _cached_on(device, config, dataset, world.place)

        def attempt(batch_gpu: int) -> None:
            by_itself = World(world.place)  # which takes as much memory, and waits for nobody
            _attempt(dataclasses.replace(config, batch_gpu=batch_gpu), device, half_dtype, on_device, by_itself)

        size, reason = by_trial(usable_batch_gpu(config), attempt, device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        size, reason = by_estimate(config, available_bytes() / world.place.local_size / 2**30)
    size, reason = min(world.gather([size, reason], "the --batch-gpu that fits"))
    note = groups_note(size, config.network.mbstd_group_size)
    found = dataclasses.replace(config, batch_gpu=size, fit_batch_gpu=False)
    return found, f"--batch-gpu auto: {reason}{note}"


def by_trial(candidates: Sequence[int], attempt: Callable[[int], None], device: torch.device) -> tuple[int, str]:
    """The largest candidate with which `attempt` does not run out of memory, or the smallest; and why."""
    failed = None
    for size in sorted(candidates, reverse=True):
        fits = _succeeds(attempt, size)
        release_memory(device)
        if fits:
            return size, f"{at_a_time(size)} fit{'s' * (size == 1)}" + (f", {failed} do not" if failed else "")
        failed = size
    return min(candidates), f"not even {at_a_time(min(candidates))} fits; trying nevertheless"


def by_estimate(config: TrainConfig, available_gb: float) -> tuple[int, str]:
    """The largest candidate whose estimate is within the budget, or the smallest; and why."""
    estimate, budget = MemoryEstimate.of(config), _SHARE * available_gb
    within = f"the budget of {budget:.1f} GB ({_SHARE:.0%} of what is free)".replace("%", " %")
    candidates = usable_batch_gpu(config)
    fitting = [size for size in candidates if estimate.total(size) <= budget]
    if fitting:
        size = max(fitting)
        return size, f"{at_a_time(size)} need{'s' * (size == 1)} about {estimate.total(size):.1f} GB of {within}"
    size = min(candidates)
    need = f"{estimate.total(size):.1f} GB"
    return size, f"not even {at_a_time(size)}, about {need}, is within {within}; trying nevertheless"


def _succeeds(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _cached_on(device: torch.device, config: TrainConfig, dataset: ImageDataset, place: Place) -> int:
    """Bytes of the device that the cache of the images is going to take."""
    choice = cache.choose(dataset, config.cache, config.cache_dir, torch.cuda.mem_get_info(device)[0], place)
    return choice.content.num_bytes if choice.mode == "device" else 0


def _attempt(config: TrainConfig, device: torch.device, half_dtype: torch.dtype, on_device: int, world: World) -> None:
    """The most that a run holds at once. Raises torch.OutOfMemoryError where that is too much."""
    if config.cuda_graphs == "on":  # which would end the run where there is no room for them
        config = dataclasses.replace(config, cuda_graphs="auto")
    images_kept = torch.empty([on_device], dtype=torch.uint8, device=device)
    state = TrainingState(config, device)
    state.set_half_dtype(half_dtype)
    data, batch = config.data, config.batch_size // config.gpus
    labels = LabelTable(
        torch.zeros([1, data.label_dim], device=device),
        torch.zeros([data.num_images], dtype=torch.long, device=device),
    )
    step = TrainStep(state, config, labels, report=lambda line: None, world=world)
    graphs = step.graphs
    images = torch.zeros([batch, data.channels, data.height, data.width], dtype=torch.uint8, device=device)
    indices = torch.zeros([batch], dtype=torch.long, device=device)
    step(images, indices)  # at nimg 0 every phase is due
    networks = state.copy_networks()  # what a snapshot and a state are written from, while training goes on
    copies = state.copy(networks)
    z = torch.randn([4 * config.batch_gpu, config.network.z_dim], device=device)
    for portion in FakesSheet(networks["G_ema"], z, labels.take(indices.new_zeros([len(z)])), 1, len(z)).portions:
        portion()
    state.progress.nimg = 0
    step(images, indices)  # with CUDA graphs, the one that is recorded
    torch.cuda.synchronize(device)
    if graphs is not None and graphs.gave_way:
        raise torch.OutOfMemoryError("there is no room for recorded phases")
    del images_kept, copies  # held until here
