"""The command that changes a model file's format: `gan convert SRC DST`."""

from __future__ import annotations

import difflib

import click

from gan.cli.command import Command, Option, given, problems_of
from gan.cli.download_bar import download_bar
from gan.errors import UsageError
from gan.files import readable_size


@click.command(cls=Command, context_settings={"max_content_width": 120})
@click.argument("files", nargs=-1, metavar="SRC DST")
@click.option(
    "--only-ema", cls=Option, is_flag=True, help="Only G_ema, which makes the pictures: to share, not to train"
)
@click.option("--fp16", cls=Option, is_flag=True, help="Store float16: half the size, rounded to 3 digits")
@click.option(
    "--noise",
    cls=Option,
    type=click.Choice(["const", "input"]),
    default="const",
    show_default=True,
    help="Of an .onnx: the stored noise, the same for every picture, or an input",
)
@click.option("--force", cls=Option, is_flag=True, help="Replace DST if it is there")
@click.option(
    "--pretrained-base", cls=Option, metavar="URL", help="Where the models are that SRC may name, or a folder"
)
@click.pass_context
def convert(
    ctx: click.Context,
    files: tuple[str, ...],
    only_ema: bool,
    fp16: bool,
    noise: str | None,
    force: bool,
    pretrained_base: str | None,
) -> None:
    """Write the networks of a model file in another format, and compare the result with it.

    \b
    SRC  a snapshot (.pkl) of this program or of any StyleGAN2-ADA, a checkpoint of its
         PyTorch port (.pt), a .safetensors of ours, an address of one, or a name like ffhq256
    DST  the file to write, whose name says in which format:
         .pkl          snapshot, for all programs that open StyleGAN2-ADA's
         .pt .pth      checkpoint for programs of the PyTorch port
         .safetensors  to share: nothing in it can be executed; with a .json beside it
         .onnx         the generator, for programs without PyTorch

    \b
    gan convert network-snapshot-000200.pkl cats.onnx
    gan convert network-snapshot-000200.pkl cats.safetensors --only-ema --fp16
    """
    problems = problems_of(ctx)
    known = [name for param in ctx.command.params for name in param.opts if name.startswith("--")]
    unknown = [name for name in files if name.startswith("-")]
    for name in unknown:
        close = difflib.get_close_matches(name.split("=")[0], known, n=1)
        problems.append(f"{name}: no such option; {f'did you mean {close[0]}?' if close else 'see --help'}")
    if len(files) != 2 and not unknown:
        problems.append(f"SRC DST: are two files, not {len(files)}, such as network-snapshot-000200.pkl cats.onnx")
    if problems or len(files) != 2:
        raise UsageError(problems)
    src, dst = files
    if not dst.lower().endswith(".onnx") and given(ctx, "noise"):
        problems.append("--noise: only an .onnx has a choice of noise; leave it out")

    from gan.models import convert as converting
    from gan.models.download import local_path

    problems += converting.problems(src, dst, half=fp16, force=force)
    if problems:
        raise UsageError(problems)
    assert noise is not None
    with download_bar() as progress:  # which is then over
        local_path(src, pretrained_base, progress)
    done = converting.convert(
        src, dst, only_ema=only_ema, half=fp16, noise=noise, force=force, base=pretrained_base, say=click.echo
    )
    for note in done.notes:
        click.echo(f"Note: {note}")
    if done.picture_difference is not None:
        levels = f" where black is -1 and white 1, {done.picture_difference * 127.5:.2g} of 255 gray levels"
        click.echo(f"Pictures: {_difference(done.picture_difference, levels)}")
    if done.score_difference is not None:
        click.echo(f"Scores of D: {_difference(done.score_difference)}")
    click.echo(f"Wrote {dst}: {readable_size(done.num_bytes)}; {src} has {readable_size(done.source_bytes)}")


def _difference(value: float, more: str = "") -> str:
    if value == 0:
        return "no difference at all"
    return f"largest difference {value:.2g}{more}"
