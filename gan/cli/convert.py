"""The command that changes a model file's format: `gan convert SRC DST`."""

from __future__ import annotations

import click

from gan.cli.command import Command, Option, given, problems_of, unknown_option
from gan.cli.download_bar import opened
from gan.cli.options import pretrained_base
from gan.errors import UsageError, printable, without_password

_LONGEST_NOTE = 1000  # characters


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
@pretrained_base
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
    unknown = [name for name in files if name.startswith("-")]
    problems += [unknown_option(ctx, name) for name in unknown]
    if len(files) != 2 and not unknown:
        problems.append(f"SRC DST: are two files, not {len(files)}, such as network-snapshot-000200.pkl cats.onnx")
    if problems or len(files) != 2:
        raise UsageError(problems)
    src, dst = files
    if not dst.lower().endswith(".onnx") and given(ctx, "noise"):
        problems.append("--noise: only an .onnx has a choice of noise; leave it out")

    from gan.files import readable_size
    from gan.models import convert as converting
    from gan.models.download import local_path

    def say(line: str) -> None:
        click.echo(printable(line))

    problems += converting.problems(src, dst, half=fp16, force=force)
    if problems:
        raise UsageError(problems)
    source = opened(src, pretrained_base)
    done = converting.convert(
        source, dst, only_ema=only_ema, half=fp16, noise_input=noise == "input", force=force, say=say
    )
    for note in done.notes:
        say(f"Note: {note[:_LONGEST_NOTE]}")
    if done.picture_difference is not None:
        levels = f" where black is -1 and white 1, {done.picture_difference * 127.5:.2g} of 255 gray levels"
        click.echo(f"Pictures: {_difference(done.picture_difference, levels)}")
    if done.score_difference is not None:
        click.echo(f"Scores of D: {_difference(done.score_difference)}")
    before = readable_size(local_path(src, pretrained_base).stat().st_size)
    say(f"Wrote {dst}: {readable_size(done.num_bytes)}; {without_password(src)} has {before}")


def _difference(value: float, more: str = "") -> str:
    if value == 0:
        return "no difference at all"
    return f"largest difference {value:.2g}{more}"
