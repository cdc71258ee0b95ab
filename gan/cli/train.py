"""The command that trains: `python train.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from gan.cli import ranks
from gan.cli.command import Command, Option, given, problems_of
from gan.cli.options import limit_spinning, parsed, train_options
from gan.cli.order import Order, dataset_of, names_run, order_of, problems_here, run_to_continue
from gan.config import TrainConfig
from gan.errors import GanError, UsageError
from gan.train_options import TrainOptions, usable_timeout
from torch_utils import distributed
from torch_utils.distributed import Place


def _options() -> list[click.Parameter]:
    return [
        *train_options(),
        Option(["--list-tensors"], is_flag=True, help="With --resume FILE: say of each tensor what becomes of it"),
        Option(["-n", "--dry-run", "dry_run"], is_flag=True, help="Print the configuration and the plan, then exit"),
        Option(["--json", "as_json"], is_flag=True, help="With --dry-run: print the configuration as one JSON object"),
    ]


@click.pass_context
def _train(
    ctx: click.Context, list_tensors: bool | None, dry_run: bool | None, as_json: bool | None, **values: Any
) -> None:
    """Train a GAN on your images, or continue a run.

    \b
    python train.py --data metfaces.zip              a new run
    python train.py --resume                         continue the newest run
    python train.py --data my.zip --resume net.pkl   a new run from the networks of a file
    """
    limit_spinning()
    problems = problems_of(ctx)
    options = parsed(values, problems)
    typed = {field.name for field in dataclasses.fields(TrainOptions) if given(ctx, field.name)}
    if as_json and not dry_run:
        problems.append("--json goes with --dry-run only; add it, or leave --json out")
    place = ranks.here()
    if place is not None:  # somebody has started as many processes as there are to be
        gpus, problem = ranks.counted(options.gpus if "gpus" in typed else None, place)
        options, typed = dataclasses.replace(options, gpus=gpus), typed | {"gpus"}
        problems += problem
        if not dry_run:
            _train_together(place, options, typed, problems, bool(list_tensors))
            return
        if not place.is_first:
            return
    order = order_of(options, typed, problems, bool(list_tensors))
    here = problems_here(order.config, place)
    if dry_run:
        folder = order.run_dir or Path(options.outdir)
        _print_plan(order.config, folder, bool(as_json), order.of_source, here)
    refused = order.refused if dry_run else here + order.refused
    if refused:
        for line in order.misfits if as_json or not dry_run else ():
            click.echo(line, err=True)
        raise UsageError(refused)
    if dry_run:
        return
    if order.config.gpus > 1:
        ctx.exit(ranks.launch(order.config.gpus, order.config.max_restarts))
    _start(order)


def _print_plan(config: TrainConfig, folder: Path, as_json: bool, of_source: list[str], here: list[str]) -> None:
    from gan.training.plan import describe_plan

    if as_json:
        click.echo(json.dumps(config.reference_options()))
    else:
        click.echo(config.to_json())
        click.echo("\n".join(["", "Plan", *(f"  {line}" for line in describe_plan(config, folder, of_source))]))
    for problem in here:
        click.echo(f"it would not start: {problem}", err=True)


def _start(order: Order) -> None:
    """Train; everything was checked."""
    from gan.training import devices, run, run_folder

    config, dataset = order.config, order.dataset
    devices.prepare(config)  # first: a kernel that breaks the device ends this process, and leaves no run behind
    if order.run_dir is not None:
        complete = run.train(config, order.run_dir, dataset, continued=True, at=order.at, notes=order.notes)
    else:
        run_dir = run_folder.create(order.outdir, config)
        complete = run.train(config, run_dir, dataset, start=order.source, notes=order.notes)
    if not complete:
        click.get_current_context().exit(distributed.STOPPED_EXIT_CODE)


def _train_together(
    place: Place, options: TrainOptions, typed: set[str], problems: list[str], list_tensors: bool
) -> None:
    """Be one of the processes that train. The first says what is done, as if it were alone; the others follow it."""
    ranks.ignore_early_signals()
    job = distributed.job()
    if job is not None and job.failed is not None:  # those that these processes replace have said why
        if place.local_rank == 0:
            click.echo(f"started again in vain: mend the error above first (exit code {job.failed})", err=True)
        click.get_current_context().exit(job.failed)
    party = ranks.Ranks(place)
    with party.speaking():
        party.join(_patience(options, typed, party.job))
        problems += ranks.same_options(party.world, {name: getattr(options, name) for name in typed})
        order = _agreed_order(party, options, typed, problems, list_tensors)
        complete = _start_together(party, order)
        party.world.close()
        click.get_current_context().exit(0 if complete else distributed.STOPPED_EXIT_CODE)


def _patience(options: TrainOptions, typed: set[str], job: distributed.Job | None) -> float:
    """--dist-timeout, as typed or as the run has it: it is needed before anything else is known."""
    from gan.training import run_folder

    begun = None if job is None else job.run_dir
    has: TrainConfig | TrainOptions = options
    with contextlib.suppress(GanError):  # it will be said when all have met
        run_dir = run_to_continue(options, []) if begun is None else Path(begun)
        has = options if run_dir is None else run_folder.read_options(run_dir)
    seconds = options.dist_timeout if "dist_timeout" in typed else has.dist_timeout
    return seconds if usable_timeout(seconds) else TrainOptions.dist_timeout


def _agreed_order(
    party: ranks.Ranks, options: TrainOptions, typed: set[str], problems: list[str], list_tensors: bool
) -> Order:
    """What the first process makes of the command line, in every process. Raises GatheredError with all problems."""
    world = party.world
    run_dir = party.run_to_go_on_with()
    order, shared, exit_code = None, None, UsageError.exit_code
    if world.is_first:
        if run_dir is not None:  # whatever was asked for has become this run
            typed = typed - {"batch_gpu"} if names_run(options.resume) else {"gpus"}
            options = dataclasses.replace(options, at=None)
        world.doing("reading the command line, the dataset and --resume")
        try:
            order = order_of(options, typed, problems, list_tensors, run_dir)
            shared = [order.config.to_json(), None if order.run_dir is None else str(order.run_dir), order.at]
            problems = order.refused
            for line in order.misfits if problems else ():
                click.echo(line, err=True)
        except GanError as error:
            problems, exit_code = str(error).splitlines(), error.exit_code
    shared = world.share(shared, "the configuration")
    if not world.is_first and shared is not None:
        config = TrainConfig.from_json(shared[0], "rank 0")
        try:
            order = Order(config, dataset_of(config), None if shared[1] is None else Path(shared[1]), shared[2])
        except GanError as error:
            problems, exit_code = [*problems, *str(error).splitlines()], error.exit_code
    if order is not None:
        problems = problems_here(order.config, party.place) + problems
    problems += ranks.same_images(party.world, None if order is None else order.dataset)
    party.require_none(problems, exit_code)
    assert order is not None  # or there was a problem
    return order


def _start_together(party: ranks.Ranks, order: Order) -> bool:
    """Train with the others; everything was checked. Returns whether the run is complete."""
    from gan.training import devices, run, run_folder

    world, place, config = party.world, party.place, order.config
    device = devices.choose_device(config.device, place)
    found = world.gather([device.type, devices.identity(device)], "the devices")
    party.require_none(devices.problems_together([kind for kind, _ in found], [identity for _, identity in found]))
    world.use(device)
    for first_of_machine in (True, False):  # what one has compiled the others find
        if (place.local_rank == 0) is first_of_machine:
            devices.prepare(config, place)
        world.gather(None, "the kernels")
    run_dir = order.run_dir
    if run_dir is None:
        made = str(run_folder.create(order.outdir, config)) if world.is_first else None
        run_dir = Path(world.share(made, "the run folder"))
    party.output.move_to(run_dir)
    if order.at is None:
        party.remember(run_dir)
    return run.train(
        config,
        run_dir,
        order.dataset,
        start=order.source,
        continued=order.run_dir is not None,
        at=order.at,
        notes=[*order.notes, *([f"Processes: {ranks.described(world)}"] if world.size > 1 else [])],
        world=world,
        begun=lambda: party.remember(run_dir),  # not before it has gone back, or --at would be forgotten
    )


train = Command(
    "train",
    params=_options(),
    callback=_train,
    help=_train.__doc__,
    context_settings={"max_content_width": 120},
)
