"""What every command is made of: its own options, those that all commands have, and plain words for wrong ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from ddpm_fast import starting
from ddpm_fast.commands import config
from ddpm_fast.commands.outcome import outcome
from ddpm_fast.commands.terminal import console, errors
from ddpm_fast.errors import InputError


class App(typer.Typer):
    """A command with its options, as `app = App()`. Calling it runs it on the command line's arguments and ends the
    process.

    Wrong options are reported like all other wrong input: on unbroken lines, with control characters as their escapes.
    """

    def __init__(self, add_completion: bool = False, keeps_config: bool = False, **options: Any):
        """Of options, see typer.Typer.

        Args:
            add_completion: Whether it has options that install the completion by the shell.
            keeps_config: Whether a run writes its options beside what it writes, so that --config can repeat it.
            **options: Typer's.
        """
        super().__init__(add_completion=add_completion, pretty_exceptions_enable=False, **options)
        self._class = _KeepingCommand if keeps_config else _Command

    def command(self, name: str | None = None, **options: Any) -> Any:
        """See typer.Typer.command. The command also gets the options that all have."""
        return super().command(name, cls=self._class, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the command."""
        starting.started()
        options["standalone_mode"] = False  # raise instead of showing an error
        try:
            status = super().__call__(*arguments, **options)
        except typer.Abort:  # what older versions of typer make of Ctrl-C
            status = starting.INTERRUPTED
        except Exception as error:
            # Typer's errors about the command line, which have no common public class in all of its versions.
            if not hasattr(error, "format_message"):
                raise
            status = getattr(error, "exit_code", 2)
            context = getattr(error, "ctx", None)
            message = error.format_message()
            if message and type(error).__name__ != "NoArgsIsHelpError":  # that one has shown the help already
                if outcome.config is not None:
                    message += outcome.config.blamed(message)
                program = context.command_path if context is not None else "this command"
                errors.print(f"[bold red]Error:[/] {escape(message)} (`{escape(program)} --help` lists the options)")
        sys.exit(status or 0)


class _Command(TyperCommand):
    """A command that takes --config and --json."""

    keeps_config = False

    def __init__(self, *arguments: Any, params: Any = None, **options: Any):
        """Of the arguments, see typer's class."""
        super().__init__(*arguments, params=[*(params or []), *_shared_options()], **options)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the options. See typer's class."""
        outcome.begin()
        console.stderr = False
        return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and tell what it did. See typer's class."""
        result, status = None, 0
        try:
            result = super().invoke(ctx)
        except typer.Exit as end:
            status = end.exit_code
            if status > 1:  # nothing was done
                raise
        if outcome.is_first:
            if self.keeps_config and status == 0 and outcome.written:
                _keep_config(ctx)
            if outcome.as_json:
                outcome.print(ctx.command_path, status)
        if status:
            raise typer.Exit(status)
        return result


class _KeepingCommand(_Command):
    """A command that writes its options beside what it writes."""

    keeps_config = True


def _keep_config(context: typer.Context) -> None:
    """Write the options of a run beside what it has written."""
    try:
        config.write(config.beside(outcome.written[0]), context.command_path, config.values_of(context))
    except InputError as error:
        errors.print(f"[yellow]Warning:[/] the options of this run could not be written: {escape(str(error))}")


def _read_config(context: typer.Context, path: Path | None) -> None:
    """Let the options of a file be those of the command, unless they are given on the command line too."""
    if path is None or context.resilient_parsing:
        return
    try:
        outcome.config = config.read(Path(os.path.expanduser(path)), context.command)  # type: ignore[arg-type]
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    context.default_map = dict(outcome.config.values)


def _answer_in_json(context: typer.Context, wanted: bool) -> None:
    """Keep standard output free for a line of JSON."""
    outcome.as_json = wanted
    console.stderr = wanted


def _shared_options() -> Any:
    """The options that all commands have, as typer makes them of a function."""
    made = typer.Typer(add_completion=False)

    @made.command()
    def shared(
        config: Annotated[
            Path | None,
            typer.Option(
                help="take options from a YAML file, such as a run writes; those on the command line go first",
                metavar="FILE",
                is_eager=True,
                expose_value=False,
                callback=_read_config,
            ),
        ] = None,
        json: Annotated[
            bool,
            typer.Option(
                "--json",
                help="print what was done as a line of JSON, and everything else to standard error",
                is_eager=True,
                expose_value=False,
                callback=_answer_in_json,
            ),
        ] = False,
    ) -> None:
        """Only its options are used."""

    return typer.main.get_command(made).params
