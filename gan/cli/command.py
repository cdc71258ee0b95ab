"""Commands whose errors are for people: all of a command line at once, no traceback, a meaningful exit code."""

from __future__ import annotations

import difflib
from typing import Any

import click

from gan.errors import GanError, printable
from gan.packages import required
from torch_utils.distributed import STOPPED_EXIT_CODE


class Option(click.Option):
    """An option whose bad value is noted with the others instead of ending the run at once."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.MissingParameter:
            problem = f"{self.opts[0]}: is missing; {self.help}"
        except click.BadParameter as error:
            value = opts.get(self.name, "")
            problem = f"{self.opts[0]} {value}: {error.message.removeprefix(repr(value)).strip()}"
        problems_of(ctx).append(problem)
        if self.expose_value and self.name:
            ctx.params[self.name] = None
        return None, args


class Command(click.Command):
    """A command that prints what its user can mend as `error:` lines, unknown options among them."""

    ignore_unknown_options = True
    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        previous = ""
        for argument in ctx.args:
            if argument.startswith("-"):
                problems_of(ctx).append(unknown_option(ctx, argument))
            elif not previous.startswith("-"):
                problems_of(ctx).append(f"{argument}: unexpected; every value follows its option, see --help")
            previous = argument
        ctx.args = []
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with required():
                return super().invoke(ctx)
        except GanError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {printable(line)}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(STOPPED_EXIT_CODE)


def problems_of(ctx: click.Context) -> list[str]:
    """The problems found so far in the command line of this run; to be extended."""
    return ctx.meta.setdefault(f"{__name__}.problems", [])


def unknown_option(ctx: click.Context, argument: str) -> str:
    """The problem with something like an option that the command has none of."""
    name = argument.split("=")[0]
    known = [option for param in ctx.command.params for option in param.opts if option.startswith("--")]
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name}: no such option; {f'did you mean {close[0]}?' if close else 'see --help'}"


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user typed this option."""
    return ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
