"""The command that measures model files: `gan metrics`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.cli import ranks
from gan.cli.command import Command, Option, given, problems_of, unknown_option
from gan.cli.download_bar import download_bar, opened
from gan.cli.metrics_order import Datasets, Item, Order, Request, known, order_of
from gan.cli.metrics_report import Row, as_json, in_words, plot, plot_run, table
from gan.cli.options import limit_spinning, train_options
from gan.errors import GanError, UsageError, printable
from gan.image_size import describe_image
from gan.metric_names import AUTO, INCEPTION, VGG, detectors_of, names_in, problems_with
from gan.train_options import DEVICES, OPS, TrainOptions
from torch_utils.distributed import Place

if TYPE_CHECKING:
    import torch

    from gan.data.dataset import ImageDataset
    from gan.metrics.detectors import Detectors
    from gan.metrics.measure import Measurement, Measuring, Reals
    from gan.networks import Generator
    from gan.tracking.measurements import Measured
    from torch_utils.world import World

_ALONE = Place()
_BAR = 1000  # steps of a progress bar


def _options() -> list[click.Parameter]:
    texts = {
        "data": "Dataset to compare with  [default: that of the run]",
        "metrics": "A list; auto: FID and KID, or swd without detector  [default: those of the run, else auto]",
        "detectors": "Folder of the detectors  [default: that of the run, GAN_DETECTORS, the cache]",
        "gpus": "Number of processes, one per GPU; under torchrun or Slurm as many as were started",
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
        Option(["--json", "as_json"], is_flag=True, help="Print one JSON object"),
        Option(["--force"], is_flag=True, help="Measure also what has been measured before"),
    ]


@click.pass_context
def _metrics(
    ctx: click.Context,
    files: tuple[str, ...],
    network: tuple[str, ...] | None,
    prefetch: bool,
    as_json: bool,
    pretrained_base: str | None,
    **values: Any,
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
    if prefetch:
        _prefetch(names, pretrained_base, values, problems)
        return
    # a value that was refused is noted among the problems, and is None
    request = Request(names, **{name: value for name, value in values.items() if value is not None})
    place = ranks.here()
    measuring = _Command(request, pretrained_base, as_json)
    if place is not None:
        counted, more = ranks.counted(request.gpus if given(ctx, "gpus") else None, place)
        measuring.request = dataclasses.replace(request, gpus=counted)
        ctx.exit(measuring.together(place, problems + more))
    order = measuring.checked_order(problems)
    if request.gpus > 1:
        ctx.exit(_launch(request.gpus))
    measuring.begin()
    ctx.exit(measuring.run(order))


def _files(ctx: click.Context, arguments: tuple[str, ...], problems: list[str]) -> Iterator[str]:
    """What was given without an option, but for options that there are none of, and their values."""
    previous = ""
    for argument in arguments:
        if argument.startswith("-"):
            problems.append(unknown_option(ctx, argument))
        elif not previous.startswith("-") or "=" in previous:
            yield argument
        previous = argument


def _prefetch(names: list[str], base: str | None, values: dict[str, Any], problems: list[str]) -> None:
    """Fetch detectors, and say where they are now."""
    from gan.metrics.detectors import prefetch

    if names or values["data"] is not None:
        problems.append("--prefetch: only fetches; leave --network, files and --data out, and measure afterwards")
    wanted = values["metrics"]
    problems += problems_with(wanted or AUTO)
    if problems:
        raise UsageError(problems)
    needed = [INCEPTION, VGG] if wanted is None else detectors_of(names_in(wanted) or ["fid50k_full"])
    if not needed:
        click.echo(f"{wanted}: needs no detector, so there is nothing to fetch")
        return
    with download_bar() as progress:
        paths = prefetch(needed, values["detectors"], base, progress)
    for path in paths:
        click.echo(printable(f"Detector:  {path}"))


def _launch(processes: int) -> int:
    try:
        return ranks.launch(processes, 0)
    except GanError as error:  # nothing is started again here: what has been measured is found by the next command
        text = str(error).replace(", and --max-restarts is 0", "").replace("--max-restarts is 0", "processes are lost")
        raise type(error)(f"{text}; the same command goes on behind what has been measured") from error


class _Command:
    """One call of the command, in one process or as one of several."""

    def __init__(self, request: Request, base: str | None, as_json: bool) -> None:
        from torch_utils.world import ALONE

        self.request = request
        self._base, self._as_json = base, as_json
        self._datasets = Datasets()
        self._world: World = ALONE
        self._place = _ALONE
        self._device: torch.device
        self._detectors: Detectors | None = None
        self._reals: dict[tuple[str, bool], Reals] = {}
        self._failures: list[str] = []
        self._rows: list[Row] = []

    def checked_order(self, problems: list[str]) -> Order:
        """What is to be done, if this machine can. Raises UsageError with everything that is wrong."""
        here = self._problems_here()
        try:
            order = order_of(self.request, self._datasets, problems)
        except UsageError as error:
            raise UsageError([*error.problems, *here]) from error
        if here:
            raise UsageError(here)
        return order

    def together(self, place: Place, problems: list[str]) -> int:
        """Be one of several processes, of which the first says what is done; the exit code."""
        ranks.ignore_early_signals()
        party = ranks.Ranks(place)
        with party.speaking():
            party.join(TrainOptions.dist_timeout)
            self._world, self._place = party.world, place
            problems = problems + ranks.same_options(party.world, dataclasses.asdict(self.request))
            order = self._agreed_order(party, problems)
            self._connect(party)
            exit_code = self.run(order)
            party.world.close()
        return exit_code

    def begin(self) -> None:
        """Make the device ready."""
        import torch

        from gan.training import devices

        self._device = devices.choose_device(self.request.device, self._place)
        if self._device.index is not None:
            torch.cuda.set_device(self._device)
        if self._device.type == "cpu":
            devices.share_cores(self._place)
            devices.keep_freed_memory()
            devices.settle_mkl_functions()
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        devices.prepare_kernels(self.request.ops, self._device)

    def run(self, order: Order) -> int:
        """Measure everything, then say what came of it; the exit code."""
        for line in order.lines:
            self._say(line)
        for line in order.left_out:
            self._fail(line)
        measured = self._known(order)
        todo = [item for item in order.items if item.metrics]
        if self._world.is_first and len(todo) < len(order.items):
            self._say(
                f"{len(order.items) - len(todo)} of {len(order.items)} files were measured before (--force: again)"
            )
        for number, item in enumerate(todo, 1):
            where = f" ({number} of {len(todo)})" if len(todo) > 1 else ""
            measured.setdefault(item.source, {}).update(self._measured(item, order, where))
        self._rows = [Row(item, measured.get(item.source, {})) for item in order.items]
        if self._world.is_first:
            self._report(order)
        return 1 if self._failures else 0

    def _agreed_order(self, party: ranks.Ranks, problems: list[str]) -> Order:
        """What the first process makes of the command line, in every process. Raises GatheredError."""
        world, order, shared, exit_code = party.world, None, None, UsageError.exit_code
        if world.is_first:
            world.doing("reading the command line, the dataset and the run")
            try:
                order = order_of(self.request, self._datasets, problems)
                shared = dataclasses.asdict(order)
            except GanError as error:
                problems, exit_code = str(error).splitlines(), error.exit_code
        shared = world.share(shared, "what is to be measured")
        if not world.is_first and shared is not None:
            order = Order(**{**shared, "items": [Item(**item) for item in shared["items"]]})
        problems = problems + self._problems_here()
        for data, cond in dict.fromkeys((item.data, bool(item.cond)) for item in order.items) if order else ():
            dataset = None
            try:
                dataset = self._datasets.get(data, cond)
            except GanError as error:
                problems, exit_code = [*problems, f"--data {error}"], error.exit_code
            problems = problems + ranks.same_images(world, dataset)
        party.require_none(problems, exit_code)
        assert order is not None  # or there was a problem
        return order

    def _connect(self, party: ranks.Ranks) -> None:
        from gan.training import devices

        world = party.world
        device = devices.choose_device(self.request.device, self._place)
        found = world.gather([device.type, devices.identity(device)], "the devices")
        party.require_none(devices.problems_together([kind for kind, _ in found], [identity for _, identity in found]))
        world.use(device)
        for first_of_machine in (True, False):  # what one has compiled the others find
            if (self._place.local_rank == 0) is first_of_machine:
                self.begin()
            world.gather(None, "the kernels")

    def _problems_here(self) -> list[str]:
        """What keeps this machine from it."""
        from gan.training import devices

        count = max(self.request.gpus, 1)
        alone = self._place.size == 1
        here = Place(size=count, local_size=count) if alone else self._place
        try:
            device = devices.choose_device(self.request.device, here)
            if alone and count > 1:
                devices.check_count(device, count)
            elif self.request.ops == "cuda":
                devices.prepare_kernels("cuda", device)
        except UsageError as error:
            return error.problems
        return []

    def _known(self, order: Order) -> dict[str, dict[str, Measured]]:
        """What the files of the runs say already, by file and metric."""
        found: dict[str, dict[str, Measured]] = {}
        if self.request.force or not self._world.is_first:
            return found
        for run_dir, dataset in self._runs(order).items():
            for measured in known(order, Path(run_dir), dataset):
                found.setdefault(str(Path(run_dir) / measured.snapshot), {})[measured.metric] = measured
        return found

    def _runs(self, order: Order) -> dict[str, ImageDataset]:
        """The runs that snapshots are measured of, with their images."""
        found = {item.run_dir: item for item in order.items if item.run_dir is not None}
        return {run_dir: self._datasets.get(item.data, bool(item.cond)) for run_dir, item in found.items()}

    def _measured(self, item: Item, order: Order, where: str) -> dict[str, Measured]:
        """Measure a file; the results by metric, on the first process."""
        G, reals, problem = self._ready(item, order)
        problem = next((found for found in self._world.gather(problem, "the networks") if found), None)
        if problem is not None or G is None or reals is None:
            self._fail(problem or "")
            return {}
        from gan.metrics.measure import Measuring

        measuring = Measuring(
            G,
            reals,
            item.metrics,
            device=self._device,
            world=self._world,
            images_at_once=self.request.batch,
            seed=order.seed,
            force_fp32=self._device.type != "cuda",  # as pictures of it are computed
        )
        begin, results = time.monotonic(), {}
        with self._progress(f"{item.shown}{where}") as show:
            told = 0
            while not self._world.agree(int(self._world.is_first and measuring.done), "a portion of the metrics"):
                measuring.advance()
                show(measuring.share)
                for measurement in measuring.measurements[told:] if self._world.is_first else ():
                    told += 1
                    results[measurement.metric] = self._keep(item, measurement, reals.dataset.fingerprint_anywhere)
        if self._world.is_first:
            self._tell(item, measuring, time.monotonic() - begin)
            for note in reals.notes:
                self._say(note)
            reals.notes.clear()
            self._renew_best(item, order)
        return results

    def _ready(self, item: Item, order: Order) -> tuple[Generator | None, Reals | None, str | None]:
        """The network of a file and the images to compare it with, or what is wrong with them."""
        from gan.metrics.detectors import Detectors
        from gan.metrics.measure import Reals
        from gan.networks import prepare_weights
        from torch_utils.user_cache import user_cache

        try:
            G = opened(item.source, self._base).require_generator()
            cond = G.c_dim > 0 if item.cond is None else item.cond
            dataset = self._datasets.get(item.data, cond)
        except GanError as error:
            return None, None, str(error)
        makes = describe_image(*G.img_size, G.img_channels)
        has = describe_image(dataset.height, dataset.width, dataset.channels)
        if makes != has:
            return None, None, f"{item.shown}: makes {makes}, and {item.data} holds {has}; give the images it is for"
        key = (item.data, cond)
        if key not in self._reals:
            self._detectors = self._detectors or Detectors(order.detectors)
            self._reals[key] = Reals(dataset, self._detectors, seed=order.seed, cache=user_cache("metrics"))
        G = G.to(self._device)
        prepare_weights(G)
        return G, self._reals[key], None

    def _keep(self, item: Item, measurement: Measurement, dataset: str) -> Measured:
        """What was measured, as it can be read again; if the file is one of a run it is written there."""
        from gan.tracking import measurements

        snapshot = Path(item.source).name if item.run_dir is not None else item.shown
        record = measurements.record_of(measurement, snapshot, self._world.size, dataset=dataset)
        if item.run_dir is not None:
            try:
                measurements.append(Path(item.run_dir), record)
            except GanError as error:
                self._fail(f"{item.shown}: {measurement.metric} was not written: {error}")
        return measurements.Measured(measurement.metric, snapshot, measurement.results, record)

    def _tell(self, item: Item, measuring: Measuring, seconds: float) -> None:
        for failure in measuring.failures:
            self._fail(f"{item.shown}: {failure}")
        found = [in_words(m.results, m.metric) for m in measuring.measurements]
        if found:
            self._say(f"{item.shown}: {', '.join(found)} ({seconds:.0f} s)")

    def _renew_best(self, item: Item, order: Order) -> None:
        from gan.training import best

        if item.run_dir is not None:
            try:
                best.renew(Path(item.run_dir), order.first_by)
            except GanError as error:
                self._fail(str(error))

    def _report(self, order: Order) -> None:
        from gan.training import best

        runs = self._runs(order)
        plots = []
        try:
            if self.request.plot is not None:
                plots = [Path(self.request.plot)]
                plot(plots[0], order, self._rows, self._datasets)
            else:
                drawn = (plot_run(order, Path(run), dataset) for run, dataset in runs.items())
                plots = [path for path in drawn if path is not None]
        except GanError as error:
            self._fail(str(error))
            plots = []
        tops = {run: best.best_snapshot(Path(run), order.first_by) for run in runs}
        found = {run: dataclasses.asdict(top) for run, top in tops.items() if top is not None}
        if self._as_json:
            click.echo(json.dumps({**as_json(self._rows, found, self._failures), "plots": [str(p) for p in plots]}))
            return
        if any(row.measured for row in self._rows):
            click.echo(table(self._rows, order.metrics))
        for run, top in tops.items():
            if top is not None:
                click.echo(printable(top.line if len(tops) == 1 else f"{top.line} of {run}"))
        for path in plots:
            click.echo(printable(f"Curves:    {path}"))

    @contextlib.contextmanager
    def _progress(self, label: str) -> Iterator[Callable[[float], None]]:
        """How far a measurement is, on a terminal."""
        if not self._world.is_first or not sys.stderr.isatty():
            yield lambda share: None
            return
        with click.progressbar(length=_BAR, label=printable(label), file=sys.stderr) as bar:
            yield lambda share: bar.update(int(share * _BAR) - bar.pos)

    def _say(self, line: str) -> None:
        """On the way; the result alone is for standard output."""
        if self._world.is_first:
            click.echo(printable(line), err=True)

    def _fail(self, line: str) -> None:
        self._failures.append(line)
        if self._world.is_first:
            click.echo(f"error: {printable(line)}", err=True)


metrics = Command(
    "metrics",
    params=_options(),
    callback=_metrics,
    help=_metrics.__doc__,
    context_settings={"max_content_width": 120},
)
