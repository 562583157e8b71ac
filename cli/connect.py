"""The one door between the command line and a registry, and the options that every command takes.

A command is a function of a `Session` and its own options, declared with `add_verbs`. Nothing behind the door is
imported before a command opens it, so that help and completion start at once.
"""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..registry.domain.errors import AdapterctlError, InvalidInput
from .output import FORMATS, Output, color_wanted, is_terminal

if TYPE_CHECKING:
    from ..registry.api import RegistryAPI
    from ..registry.settings import Settings

Home = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="Folder of the registry.  [env: ADAPTERCTL_HOME]")
]
Format = Annotated[str | None, typer.Option("--output", "-o", metavar="FORMAT", help="table, json, yaml or name.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print names or ids only, one a line.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Print without colour.  [env: NO_COLOR]")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]


@dataclass(frozen=True, slots=True)
class Session:
    """What one command was told about where the registry is and how to print."""

    home: Path | None = None
    out: Output = field(default_factory=Output)

    def settings(self) -> Settings:
        from ..registry.settings import load_settings  # deferred: help needs no settings

        return load_settings({"home": self.home.absolute() if self.home else None})

    def registry(self, *, readonly: bool = False) -> RegistryAPI:
        """Open the registry; with `readonly` nothing is created or migrated, and a read-only home is enough."""
        from ..bootstrap import open_registry, tell_errors_once  # deferred: help opens nothing

        _show_warnings()
        tell_errors_once()
        return open_registry(self.settings(), readonly=readonly)


def _show_warnings() -> None:
    """Let what the registry logs look like the warnings of the commands."""
    import logging  # deferred: help and completion log nothing

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("adapterctl").handlers = [handler]


@dataclass(frozen=True, slots=True)
class Common:
    """The shared options as they were given, before or after the command's name; what comes after wins."""

    home: Path | None = None
    output: str | None = None
    quiet: bool = False
    no_color: bool = False
    verbose: bool = False

    def over(self, earlier: Common) -> Common:
        return Common(
            self.home or earlier.home,
            self.output or (None if self.quiet else earlier.output),
            self.quiet or (earlier.quiet and not self.output),
            self.no_color or earlier.no_color,
            self.verbose or earlier.verbose,
        )

    def session(self, formats: tuple[str, ...]) -> Session:
        chosen = self.output or ("name" if self.quiet else formats[0])
        if chosen not in formats:
            raise typer.BadParameter(f"{chosen!r} is not one of {', '.join(formats)}", param_hint="'-o'")
        return Session(self.home, Output(chosen, color_wanted(self.no_color), self.verbose))


def add_verbs(
    app: typer.Typer,
    verbs: Mapping[str, Callable[..., None]],
    *,
    group: str | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> None:
    """Make commands of functions that take a `Session` first, then their own options.

    Errors of ours become messages and exit codes here. `formats` are what `-o` accepts, the default first; `group` is
    the heading in the help of the program.
    """
    for name, function in verbs.items():
        app.command(name, rich_help_panel=group)(_with_session(function, formats))


def confirm(question: str, command: str) -> None:
    """Ask on a terminal. Raises `InvalidInput` where nobody can answer, `typer.Abort` for a no."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise InvalidInput(f"{question} nobody is there to answer", hint=f"run {command}")
    typer.confirm(question, abort=True, err=True)


def _with_session(function: Callable[..., None], formats: tuple[str, ...]) -> Callable[..., None]:
    """The function as typer wants it: the shared options in its signature, in place of the session."""

    @functools.wraps(function)
    def run(ctx: typer.Context, **options: Any) -> None:
        given = Common(**{key: options.pop(key) for key in _SHARED})
        session = given.over(ctx.obj if isinstance(ctx.obj, Common) else Common()).session(formats)
        try:
            function(session, **options)
        except AdapterctlError as error:
            if session.out.verbose:
                traceback.print_exception(error)
            raise typer.Exit(session.out.fail(error)) from error

    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    parameters = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        *_shared_parameters(formats),
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


_SHARED = ("home", "output", "quiet", "no_color", "verbose")


def _shared_parameters(formats: tuple[str, ...]) -> list[inspect.Parameter]:
    """The options of the program again, after a command's own; the help shows those that shape its data."""
    listed = ", ".join(formats[:-1]) + f" or {formats[-1]}"
    kinds: dict[str, tuple[Any, Any]] = {
        "output": (
            Annotated[str | None, typer.Option("--output", "-o", metavar="FORMAT", help=f"{listed}.")],
            None,
        ),
        "quiet": (Quiet, False),
        "home": (Annotated[Path | None, typer.Option("--home", hidden=True)], None),
        "no_color": (Annotated[bool, typer.Option("--no-color", hidden=True)], False),
        "verbose": (Annotated[bool, typer.Option("--verbose", "-v", hidden=True)], False),
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in kinds.items()
    ]
