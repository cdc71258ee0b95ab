"""The command that samples: `python generate.py`."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.cli.class_label import LabelType, chosen_label
from gan.cli.command import Command, Option, problems_of
from gan.cli.download_bar import opened
from gan.cli.options import limit_spinning, pretrained_base
from gan.errors import GanError, UsageError, printable, without_password
from gan.train_options import DEVICES, OPS, TrainOptions

if TYPE_CHECKING:
    import torch

    from gan.models import Snapshot
    from gan.networks import Generator


@dataclasses.dataclass(frozen=True)
class Request:
    """What to sample."""

    path: str
    seeds: list[int] | None
    projected_w: str | None
    trunc: float
    noise_mode: str
    outdir: Path
    batch: int
    device: str
    ops: str


class SeedsType(click.ParamType):
    """Numbers and ranges, such as 0-35 or 0-5,8."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        seeds: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
            if match is None:
                self.fail("is not a list of numbers and ranges; write it like 0-35 or 0-5,8", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or max(last, last - first) >= 2**32:
                self.fail(f"{part.strip()} is not a range of seeds from 0 to 4294967295", param, ctx)
            seeds += range(first, last + 1)
        return seeds


@click.command(cls=Command, context_settings={"max_content_width": 120})
@click.option("--seeds", cls=Option, type=SeedsType(), help="Seeds of the pictures, such as 0-35 or 0-5,8")
@click.option(
    "--network",
    cls=Option,
    metavar="FILE|URL|NAME",
    help="Model file  [default: the newest snapshot under training-runs]",
)
@pretrained_base
@click.option("--trunc", cls=Option, type=float, default=1.0, show_default=True, help="Truncation psi: less is safer")
@click.option(
    "--class",
    "classes",
    cls=Option,
    multiple=True,
    metavar="N|NAME",
    help="Class, for a network with classes; several times where pictures have several",
)
@click.option(
    "--label",
    cls=Option,
    type=LabelType(),
    metavar="X,Y,...",
    help="Label, for a network trained on vectors: as many numbers as theirs have",
)
@click.option(
    "--noise-mode",
    cls=Option,
    type=click.Choice(["const", "random", "none"]),
    default="const",
    show_default=True,
    help="Noise that is the same for every picture, new for each, or none",
)
@click.option("--projected-w", cls=Option, metavar="FILE", help="An .npz with w, to render instead of seeds")
@click.option("--outdir", cls=Option, default="out", show_default=True, metavar="DIR", help="Folder for the pictures")
@click.option("--batch", cls=Option, type=int, default=16, show_default=True, help="Pictures computed at a time")
@click.option("--device", cls=Option, type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option(
    "--ops",
    cls=Option,
    type=click.Choice(OPS),
    default="auto",
    show_default=True,
    help=TrainOptions.__dataclass_fields__["ops"].metadata["help"],
)
@click.pass_context
def generate(
    ctx: click.Context,
    seeds: list[int] | None,
    network: str | None,
    pretrained_base: str | None,
    trunc: float | None,
    classes: tuple[str, ...],
    label: list[float] | None,
    noise_mode: str | None,
    projected_w: str | None,
    outdir: str | None,
    batch: int | None,
    device: str | None,
    ops: str | None,
) -> None:
    """Sample pictures from a model file: seed0000.png, ... and a sheet of all, grid.png.

    \b
    python generate.py --seeds 0-35
    python generate.py --seeds 0-5,8 --trunc 0.7 --network network-snapshot-000200.pkl
    """
    limit_spinning()
    problems = problems_of(ctx)
    broken = {problem.split()[0].rstrip(":") for problem in problems}
    if seeds is None and projected_w is None and "--seeds" not in broken:
        problems.append("--seeds: is missing; for example --seeds 0-35")
    if seeds is not None and projected_w is not None:
        problems.append("--projected-w renders a given w; leave out --seeds")
    if projected_w is not None and (classes or label is not None):
        problems.append("--projected-w renders a given w, whatever the class; leave out --class and --label")
    if batch is not None and batch < 1:
        problems.append(f"--batch {batch}: must be a whole number from 1 on")
    path = _chosen_network(network, problems)
    here = _problems_here(device, ops) if device and ops else []
    problems += here
    snapshot = _open(path, pretrained_base, problems) if path is not None and not here else None
    G = None if snapshot is None else snapshot.generator
    c: list[float] = []
    if snapshot is not None and G is not None and projected_w is None and "--label" not in broken:
        c = chosen_label(snapshot, G.c_dim, classes, label, problems)
    if problems or path is None or G is None:
        raise UsageError(problems)
    assert trunc is not None and noise_mode and outdir and batch and device and ops  # noqa: PT018
    for note in () if snapshot is None else snapshot.notes:
        click.echo(printable(f"{path}: {note}"))
    _render(G, c, Request(path, seeds, projected_w, trunc, noise_mode, Path(outdir), batch, device, ops))


def _problems_here(device: str, ops: str) -> list[str]:
    """What keeps this machine from it, before anything is fetched."""
    from gan.training.devices import choose_device, prepare_kernels

    try:
        chosen = choose_device(device)
        if ops == "cuda":
            prepare_kernels(ops, chosen)
    except UsageError as error:
        return error.problems
    return []


def _chosen_network(network: str | None, problems: list[str]) -> str | None:
    from gan.training import run_folder

    if network is not None:
        return network
    try:
        return str(run_folder.newest_snapshot(TrainOptions().outdir))
    except GanError as error:
        problems.append(str(error))
        return None


def _open(path: str, base: str | None, problems: list[str]) -> Snapshot | None:
    try:
        snapshot = opened(path, base)
        snapshot.require_generator()
    except GanError as error:
        problems.append(f"--network {error}")
        return None
    return snapshot


def _render(G: Generator, label: list[float], request: Request) -> None:
    """Compute and write the pictures; a batch is encoded and written while the next one is computed."""
    import numpy as np

    from gan.files import write_png
    from gan.latent.sampling import Sheet, synthesize
    from gan.networks import prepare_weights
    from gan.training.devices import choose_device, prepare_kernels, settle_mkl_functions
    from gan.training.resources import kernels_in_use
    from torch_utils.memory import keep_freed_memory
    from torch_utils.ops import kernels

    device, outdir = choose_device(request.device), request.outdir
    if device.type == "cpu":
        keep_freed_memory()
        settle_mkl_functions()
    prepare_kernels(request.ops, device)
    if device.type == "cuda" and kernels.missing():
        click.echo(kernels_in_use(), err=True)
    G = G.to(device)
    prepare_weights(G)
    if request.projected_w is not None:
        ws = _load_ws(request.projected_w, G)
        names = [f"proj{i:02d}.png" for i in range(len(ws))]
    else:
        assert request.seeds is not None
        ws = _map_seeds(G, request.seeds, label, request)
        names = [f"seed{seed:04d}.png" for seed in request.seeds]
    # Half precision is for GPUs: on a CPU a picture should not depend on which one it is.
    pictures = synthesize(G, ws.to(device), request.batch, request.noise_mode, force_fp32=device.type != "cuda")
    sheet = Sheet(len(names), int(np.ceil(np.sqrt(len(names)))), (G.img_channels, *G.img_size))
    with ThreadPoolExecutor() as writers:
        jobs: deque[Future[None]] = deque()
        for i, (name, image) in enumerate(zip(names, pictures, strict=True)):
            jobs.append(writers.submit(write_png, outdir / name, image))
            sheet.put(i, image)
            while len(jobs) > 2 * request.batch:  # so that slow disks do not fill the memory
                jobs.popleft().result()
        for job in jobs:
            job.result()
    path = outdir / "grid.png"
    write_png(path, sheet.image)
    source = without_password(request.path)
    click.echo(f"Wrote {len(names)} pictures of {source} to {outdir}/ and a sheet of them to {path}")


def _map_seeds(G: Generator, seeds: list[int], label: list[float], request: Request) -> torch.Tensor:
    import numpy as np
    import torch

    from gan.latent.sampling import seed_latent

    device = G.mapping.w_avg.device
    z = torch.from_numpy(np.concatenate([seed_latent(seed, G.z_dim) for seed in seeds])).to(device)
    labels = torch.tensor([label], device=device).expand(len(z), -1)
    with torch.no_grad():
        parts = zip(z.split(request.batch), labels.split(request.batch), strict=True)
        return torch.cat([G.mapping(part, c, truncation_psi=request.trunc) for part, c in parts])


def _load_ws(path: str, G: Generator) -> torch.Tensor:
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            w = file["w"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError([f"--projected-w {path}: not an .npz with an array w ({error})"]) from error
    if w.ndim != 3 or w.shape[1:] != (G.num_ws, G.w_dim):
        raise UsageError([f"--projected-w {path}: w is {list(w.shape)}, this network takes [N, {G.num_ws}, {G.w_dim}]"])
    return torch.from_numpy(w).to(torch.float32)
