"""Where `gan metrics` computes: in this process, or as one of several, which agree on what is done."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gan.cli import ranks
from gan.cli.metrics_order import Order, Request, order_of
from gan.cli.metrics_sources import Datasets, Item
from gan.errors import GanError, UsageError
from torch_utils.distributed import Place

if TYPE_CHECKING:
    import torch


def checked_order(request: Request, datasets: Datasets, problems: list[str]) -> Order:
    """What is to be done, if this machine can. Raises UsageError with everything that is wrong."""
    here = _problems_here(request, Place(size=max(request.gpus, 1), local_size=max(request.gpus, 1)), alone=True)
    try:
        order = order_of(request, datasets, problems)
    except UsageError as error:
        raise UsageError([*error.problems, *here]) from error
    if here:
        raise UsageError(here)
    return order


def agreed_order(request: Request, datasets: Datasets, party: ranks.Ranks, problems: list[str]) -> Order:
    """What the first process makes of the command line, in every process. Raises GatheredError."""
    world, order, shared, exit_code = party.world, None, None, UsageError.exit_code
    problems = problems + ranks.same_options(world, dataclasses.asdict(request))
    if world.is_first:
        world.doing("reading the command line, the dataset and the run")
        try:
            order = order_of(request, datasets, problems)
            shared = dataclasses.asdict(order)
        except GanError as error:
            problems, exit_code = str(error).splitlines(), error.exit_code
    shared = world.share(shared, "what is to be measured")
    if not world.is_first and shared is not None:
        order = Order(**{**shared, "items": [Item(**item) for item in shared["items"]]})
    problems = problems + _problems_here(request, party.place)
    for data, cond in dict.fromkeys((item.data, bool(item.cond)) for item in order.items) if order else ():
        dataset = None
        try:
            dataset = datasets.get(data, cond)
        except GanError as error:
            problems, exit_code = [*problems, f"--data {error}"], error.exit_code
        problems = problems + ranks.same_images(world, dataset)
    party.require_none(problems, exit_code)
    assert order is not None  # or there was a problem
    return order


def ready_device(request: Request, place: Place | None = None) -> torch.device:
    """The device of this process, with its kernels."""
    import torch

    from gan.training import devices
    from torch_utils.memory import keep_freed_memory

    place = place or Place()
    device = devices.choose_device(request.device, place)
    if device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        devices.share_cores(place)
        keep_freed_memory()
        devices.settle_mkl_functions()
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    devices.prepare_kernels(request.ops, device)
    return device


def connected_device(request: Request, party: ranks.Ranks) -> torch.device:
    """The device of this process, with its kernels and its connection to those of the others."""
    from gan.training import devices

    world, place = party.world, party.place
    device = devices.choose_device(request.device, place)
    found = world.gather([device.type, devices.identity(device)], "the devices")
    party.require_none(devices.problems_together([kind for kind, _ in found], [identity for _, identity in found]))
    world.use(device)
    for first_of_machine in (True, False):  # what one has compiled the others find
        if (place.local_rank == 0) is first_of_machine:
            device = ready_device(request, place)
        world.gather(None, "the kernels")
    return device


def _problems_here(request: Request, place: Place, alone: bool = False) -> list[str]:
    """What keeps this machine from it; `alone`: the others of `place` are not there yet."""
    from gan.training import devices

    try:
        device = devices.choose_device(request.device, place)
        if alone and place.size > 1:
            devices.check_count(device, place.size)
        elif request.ops == "cuda":
            devices.prepare_kernels("cuda", device)
    except UsageError as error:
        return error.problems
    return []
