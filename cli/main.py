"""The program: its options, its commands in groups, and the edge where what nobody expected becomes an exit code.

This module and the command modules import typer and standard library only; each command imports what it needs when it
runs. A test in a fresh process holds them to it.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..registry.domain.errors import AdapterctlError, InvalidInput
from .commands import adapters, admin, base, carry, demo, evals, gates, jobs, lineage, merge, service, stages, tune
from .complete import whole_words
from .connect import Common, Format, Home, NoColor, Quiet, Verbose
from .output import Output, printable, write

#: typer has no public name for it.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


class Program(TyperGroup):
    """The commands under the headings of their groups, in the order in which a newcomer meets them."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As typer does it, but where JSON is asked for, an error of usage is an object like any other error."""
        if not (options.get("standalone_mode", True) and _asks_for_json(sys.argv)):
            return super().main(*args, **options)
        try:
            sys.exit(super().main(*args, **options | {"standalone_mode": False}))
        except _USAGE_ERROR as error:
            wrong: Any = error
            path = wrong.ctx.command_path if wrong.ctx is not None else "adapterctl"
            sys.exit(Output("json").fail(InvalidInput(wrong.format_message(), hint=f"{path} -h")))
        except typer.Abort:
            write(sys.stderr, "Aborted!")
            sys.exit(1)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands))
        for name, command in self.commands.items():
            heading = getattr(command, "rich_help_panel", None) or "Commands"
            brief = command.get_short_help_str(formatter.width - width - 6)
            groups.setdefault(heading, []).append((name.ljust(width), brief))
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Program,
    help="Register, merge, prove, evaluate and promote LoRA adapters, on top of MLflow.",
    epilog="The options above are also accepted after the name of a command. Start here: adapterctl demo",
    no_args_is_help=True,
    # rich doubles the time to the help text, and pipes garble its boxes
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _asks_for_json(words: list[str]) -> bool:
    """Whether `-o json` is among the words; read by hand, for it may stand behind what cannot be parsed."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return any(
        word in ("-ojson", "--output=json") or (word in ("-o", "--output") and value == "json") for word, value in pairs
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        write(sys.stdout, f"adapterctl {__version__}")
        raise typer.Exit


@app.callback()
def program(
    ctx: typer.Context,
    home: Home = None,
    output: Format = None,
    quiet: Quiet = False,
    no_color: NoColor = False,
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    ctx.obj = Common(home, output, quiet, no_color, verbose)


for module in (demo, adapters, carry, merge, tune, lineage, evals, gates, stages, jobs, base, service, admin):
    module.add_to(app)


def main() -> None:
    """Entry point of the console script. Errors of ours are handled where they arise, in `connect.add_verbs`."""
    # Importing makes hundreds of thousands of objects that stay; by default, looking for garbage among them again and
    # again takes a sixth of the time of a short command.
    gc.set_threshold(100_000)
    in_bash = os.environ.get("_ADAPTERCTL_COMPLETE") == "complete_bash"
    try:
        with whole_words() if in_bash else nullcontext():
            app(prog_name="adapterctl")
    except AdapterctlError as error:  # the output is lost before a command had begun
        sys.exit(Output().fail(error))
    except Exception as error:  # noqa: BLE001 - the edge of the process: whatever came this far is told, not dumped
        if {"-v", "--verbose"}.intersection(sys.argv):
            traceback.print_exception(error)
        write(sys.stderr, f"error: unexpected {type(error).__name__}: {printable(error)}")
        write(sys.stderr, "hint: run it again with -v for the traceback; a bug report with it is welcome")
        sys.exit(1)
