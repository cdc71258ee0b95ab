"""The command that measures model files: `gan metrics`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gan.cli import ranks
from gan.cli.command import Command, Option, given, problems_of, unknown_option
from gan.cli.download_bar import download_bar
from gan.cli.metrics_order import Order, Request
from gan.cli.metrics_sources import Datasets
from gan.cli.options import limit_spinning, train_options
from gan.errors import UsageError, printable
from gan.metric_names import AUTO, INCEPTION, METRICS, VGG, chosen, detectors_of, problems_with
from gan.train_options import DEVICES, OPS, TrainOptions

if TYPE_CHECKING:
    import torch

    from torch_utils.distributed import Place
    from torch_utils.world import World


def _options() -> list[click.Parameter]:
    texts = {
        "data": "Dataset to compare with  [default: that of the run]",
        "metrics": "A list; auto: FID and KID, or swd without detector  [default: those of the run, else auto]",
        "detectors": "Folder of the detectors  [default: that of the run, GAN_DETECTORS, the cache]",
        "gpus": "Number of processes, one per GPU; under torchrun or Slurm as many as were started",
        "pretrained_base": "Folder or address of the networks that have names, and of the detectors",
    }
    return [
        click.Argument(["files"], nargs=-1, metavar="[FILE|RUN_DIR]..."),
        Option(
            ["--network"],
            multiple=True,
            metavar="FILE|URL|NAME|RUN_DIR",
            help="What to measure, of a run all its snapshots; may be repeated  [default: the newest run]",
        ),
        *train_options(["data", "detectors", "gpus", "pretrained_base"], texts),
        Option(["--metrics"], metavar="auto|LIST", help=texts["metrics"]),
        Option(["--prefetch"], is_flag=True, help="Only fetch the detectors, all or those that --metrics needs"),
        Option(
            ["--seed"], type=int, default=Request.seed, show_default=True, help="Of the fakes; training measures with 0"
        ),
        Option(["--device"], type=click.Choice(DEVICES), default=Request.device, show_default=True),
        Option(
            ["--ops"],
            type=click.Choice(OPS),
            default=Request.ops,
            show_default=True,
            help=TrainOptions.__dataclass_fields__["ops"].metadata["help"],
        ),
        Option(["--batch"], type=int, default=Request.batch, show_default=True, help="Pictures computed at a time"),
        Option(["--plot"], metavar="PNG", help="Curves  [default: metrics.png in the folder of a run]"),
        Option(["--json"], is_flag=True, help="Print one JSON object"),
        Option(["--force"], is_flag=True, help="Measure also what has been measured before"),
    ]


@click.pass_context
def _metrics(
    ctx: click.Context, files: tuple[str, ...], network: tuple[str, ...] | None, prefetch: bool, **values: Any
) -> None:
    """Measure model files: how near their pictures come to the images, and which is the best.

    \b
    python -m gan metrics                                    all snapshots of the newest run
    python -m gan metrics network-snapshot-000200.pkl --metrics fid50k_full,pr50k3_full
    python -m gan metrics ffhq256 --data ffhq.zip            any model file, address or name
    python -m gan metrics --prefetch                         fetch the detectors, for later

    Results of a run's snapshots go into its metric-*.jsonl; what is there already is not measured again.
    """
    limit_spinning()
    problems = problems_of(ctx)
    names = [*_files(ctx, files, problems), *(network or ())]
    # a value that was refused is noted among the problems, and is None
    request = Request(names, **{name: value for name, value in values.items() if value is not None})
    if prefetch:
        _prefetch(request, problems)
        return
    from gan.cli import metrics_together

    place, datasets = ranks.here(), Datasets()
    if place is not None:
        counted, more = ranks.counted(request.gpus if given(ctx, "gpus") else None, place)
        ctx.exit(_together(dataclasses.replace(request, gpus=counted), place, datasets, problems + more))
    order = metrics_together.checked_order(request, datasets, problems)
    if request.gpus > 1:
        again = "the same command without --force" if request.force else "the same command"
        kept = f"what has been measured is kept: {again} goes on behind it"
        ctx.exit(ranks.launch(request.gpus, 0, in_vain=kept))
    ctx.exit(_measure(request, order, datasets, metrics_together.ready_device(request)))


def _files(ctx: click.Context, arguments: tuple[str, ...], problems: list[str]) -> Iterator[str]:
    """What was given without an option, but for options that there are none of, and their values."""
    previous = ""
    for argument in arguments:
        if argument.startswith("-"):
            problems.append(unknown_option(ctx, argument))
        elif not previous.startswith("-") or "=" in previous:
            yield argument
        previous = argument


def _prefetch(request: Request, problems: list[str]) -> None:
    """Fetch detectors, and say where they are now."""
    from gan.metrics.detectors import prefetch

    if request.networks or request.data is not None:
        problems.append("--prefetch: only fetches; leave --network, files and --data out, and measure afterwards")
    wanted = request.metrics
    problems += problems_with(wanted or AUTO)
    if problems:
        raise UsageError(problems)
    needed = [INCEPTION, VGG] if wanted is None else detectors_of(chosen(wanted, lambda name: True))
    if not needed:
        click.echo(f"{wanted}: needs no detector, so there is nothing to fetch")
        return
    with download_bar() as progress:
        paths = prefetch(needed, request.detectors, request.pretrained_base, progress)
    for path in paths:
        click.echo(printable(f"Detector:  {path}"))


def _together(request: Request, place: Place, datasets: Datasets, problems: list[str]) -> int:
    """Be one of several processes, of which the first says what is done; the exit code."""
    from gan.cli import metrics_together

    ranks.ignore_early_signals()
    party = ranks.Ranks(place)
    with party.speaking():
        party.join(TrainOptions.dist_timeout)
        order = metrics_together.agreed_order(request, datasets, party, problems)
        device = metrics_together.connected_device(request, party)
        exit_code = _measure(request, order, datasets, device, party.world)
        party.world.close()
    return exit_code


def _measure(
    request: Request, order: Order, datasets: Datasets, device: torch.device, world: World | None = None
) -> int:
    """Measure everything, then say what came of it; the exit code."""
    from gan.cli.metrics_report import report
    from gan.cli.metrics_work import Work
    from torch_utils.world import ALONE

    work = Work(request, order, datasets, device, world or ALONE)
    rows = work.do()
    if world is None or world.is_first:
        report(rows, request, order, datasets, work)
    return 1 if work.failures else 0


class _Command(Command):
    """Whose help says which metrics there are."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Metrics"):
            formatter.write_dl([(metric.name, metric.text) for metric in METRICS.values()])


metrics = _Command(
    "metrics",
    params=_options(),
    callback=_metrics,
    help=_metrics.__doc__,
    context_settings={"max_content_width": 120},
)
