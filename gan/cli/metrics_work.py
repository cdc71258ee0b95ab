"""Measure the files of an order of `gan metrics`, one after the other."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from gan.cli.download_bar import opened
from gan.cli.metrics_order import Order, Request, measured_before
from gan.cli.metrics_report import Row
from gan.cli.metrics_sources import Datasets, Item
from gan.errors import GanError, printable
from gan.image_size import describe_image
from gan.metric_names import in_words
from gan.metrics.detectors import Detectors
from gan.metrics.measure import Measurement, Measuring, Reals
from gan.tracking import measurements
from gan.tracking.measurements import Measured
from gan.training import best
from torch_utils.world import World

if TYPE_CHECKING:
    from gan.networks import Generator

_BAR = 1000  # steps of a progress bar


class Work:
    """The files of an order, and the images that they are compared with."""

    def __init__(self, request: Request, order: Order, datasets: Datasets, device: torch.device, world: World) -> None:
        self._request, self._order, self._datasets = request, order, datasets
        self._device, self._world = device, world
        self._detectors = Detectors(order.detectors)
        self._reals: dict[tuple[str, bool], Reals] = {}
        self.failures: list[str] = []
        """what could not be done, and was said"""

    def do(self) -> list[Row]:
        """Measure everything; what is known of each file then, on the first process."""
        order = self._order
        for line in order.lines:
            self._say(line)
        for line in order.left_out:
            self.fail(line)
        todo = [item for item in order.items if item.metrics]
        measured: dict[str, dict[str, Measured]] = {}
        if self._world.is_first and not self._request.force:
            measured = measured_before(order, self._datasets)
        if self._world.is_first and len(todo) < len(order.items):
            self._say(
                f"{len(order.items) - len(todo)} of {len(order.items)} files were measured before (--force: again)"
            )
        for number, item in enumerate(todo, 1):
            where = f" ({number} of {len(todo)})" if len(todo) > 1 else ""
            measured.setdefault(item.source, {}).update(self._measured(item, where))
        return [Row(item, measured.get(item.source, {})) for item in order.items]

    def fail(self, line: str) -> None:
        """Something that was asked for cannot be had."""
        self.failures.append(line)
        if self._world.is_first:
            click.echo(f"error: {printable(line)}", err=True)

    def _measured(self, item: Item, where: str) -> dict[str, Measured]:
        """Measure a file; the results by metric, on the first process."""
        G, reals, problem = self._ready(item)
        problem = next((found for found in self._world.gather(problem, "the networks") if found), None)
        if problem is not None or G is None or reals is None:
            self.fail(problem or "")
            return {}
        measuring = Measuring(
            G,
            reals,
            item.metrics,
            device=self._device,
            world=self._world,
            images_at_once=self._request.batch,
            seed=self._order.seed,
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
                    results[measurement.metric] = self._keep(item, measurement, reals)
        if self._world.is_first:
            self._tell(item, measuring, time.monotonic() - begin)
            for note in reals.notes:
                self._say(note)
            reals.notes.clear()
            self._renew_best(item)
        return results

    def _ready(self, item: Item) -> tuple[Generator | None, Reals | None, str | None]:
        """The network of a file and the images to compare it with, or what is wrong with them."""
        try:
            G = opened(item.source, self._request.pretrained_base).require_generator()
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
            self._reals[key] = Reals(dataset, self._detectors, seed=self._order.seed)
        return G.to(self._device), self._reals[key], None

    def _keep(self, item: Item, measurement: Measurement, reals: Reals) -> Measured:
        """What was measured, as it can be read again; if the file is one of a run it is written there."""
        name, nimg, dataset = item.shown, None, None
        with contextlib.suppress(GanError, OSError):  # either may be gone now, and the number is there
            dataset = reals.fingerprint
        with contextlib.suppress(GanError, OSError):
            nimg = None if item.run_dir is None else measurements.nimg_of(Path(item.run_dir), name)
        record = measurements.record_of(measurement, name, self._world.size, dataset=dataset, nimg=nimg)
        if item.run_dir is not None:
            try:
                measurements.append(Path(item.run_dir), record)
            except GanError as error:
                self.fail(f"{item.shown}: {measurement.metric} was not written: {error}")
        return Measured(measurement.metric, name, measurement.results, record)

    def _tell(self, item: Item, measuring: Measuring, seconds: float) -> None:
        for failure in measuring.failures:
            self.fail(f"{item.shown}: {failure}")
        found = [in_words(m.metric, m.results) for m in measuring.measurements]
        if found:
            self._say(f"{item.shown}: {', '.join(found)} ({seconds:.0f} s)")

    def _renew_best(self, item: Item) -> None:
        if item.run_dir is not None:
            try:
                best.renew(Path(item.run_dir), self._order.first_by)
            except GanError as error:
                self.fail(str(error))

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
