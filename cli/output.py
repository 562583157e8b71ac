"""What people and programs see: data on stdout in the format they ask for, talk on stderr, one exit code an outcome.

Tables are plain columns, so that they can be cut and grepped; colour and clipping appear on a terminal only. Nothing
that comes from a registry reaches a terminal raw: control and direction characters are shown as escapes, in JSON too.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from ..registry.domain import errors
from ..registry.services.words import HOSTILE
from ..registry.services.words import printable as printable

FORMATS = ("table", "json", "yaml", "name")

#: Every class of `domain/errors.py` has its row; a test sees to it. 130 is a command left with Ctrl-C.
EXIT_CODES: Mapping[type[errors.AdapterctlError], int] = MappingProxyType(
    {
        errors.AdapterctlError: 1,
        errors.Conflict: 1,
        errors.Corrupt: 1,
        errors.Unavailable: 1,
        errors.TooManyRequests: 1,
        errors.InvalidInput: 2,
        errors.Misconfigured: 2,
        errors.NotFound: 3,
        errors.NotAllowed: 4,
        errors.Refused: 5,
        errors.InvalidAdapter: 5,
        errors.IncompatibleParents: 5,
        errors.ReceiptFailed: 5,
        errors.GateRefused: 5,
        errors.LossTooHigh: 5,
        errors.Recalled: 5,
        errors.StageMoved: 5,
        errors.DecisionOutdated: 5,
        errors.HasDescendants: 5,
        errors.JobFailed: 6,
        errors.JobCancelled: 7,
        errors.WaitTimedOut: 8,
    }
)
INTERRUPTED = 130

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command writes to. `format` is one of `FORMATS` or a format of the command's own."""

    format: str = "table"
    color: bool = True
    verbose: bool = False

    def data(self, value: Any, *, text: Callable[[], str], names: Iterable[str]) -> None:
        """Print `value`: as JSON or YAML, as its `names` one a line, or as the text for people."""
        if self.format == "json":
            write(sys.stdout, as_json(value))
        elif self.format == "yaml":
            write(sys.stdout, as_yaml(value).rstrip("\n"))
        elif self.format == "name":
            for name in names:
                write(sys.stdout, name)
        else:
            write(sys.stdout, text())

    def line(self, value: Any, *, text: str, name: str) -> None:
        """Print one value of a stream that goes on: a JSON line, a YAML list item, a name, or a line of text."""
        if self.format == "json":
            write(sys.stdout, as_json(value, indent=0))
        elif self.format == "yaml":
            write(sys.stdout, as_yaml([value]).rstrip("\n"))
        else:
            write(sys.stdout, name if self.format == "name" else text)

    def say(self, text: str) -> None:
        """Talk to people, on stderr; programs that ask for names only are not talked to."""
        if self.format != "name":
            write(sys.stderr, text)

    def warn(self, text: str) -> None:
        write(sys.stderr, f"{self.paint('warning:', 'yellow', sys.stderr)} {printable(text)}")

    def fail(self, error: errors.AdapterctlError) -> int:
        """Print what went wrong and what to do next; return the exit code."""
        if self.format == "json":
            write(sys.stderr, as_json(_error_object(error)))
            return exit_code(error)
        write(sys.stderr, f"{self.paint('error:', 'red', sys.stderr)} {_printable_lines(error.message)}")
        for problem in error.problems:
            line = f"{problem.code}: {problem.message}"
            if line not in error.message:
                write(sys.stderr, f"  {printable(line)}" + (f" ({printable(problem.hint)})" if problem.hint else ""))
        if error.hint:
            write(sys.stderr, f"{self.paint('hint:', 'cyan', sys.stderr)} {_printable_lines(error.hint)}")
        return exit_code(error)

    def paint(self, text: str, style: str, stream: TextIO | None = None) -> str:
        """`text` in a style, where the stream is a terminal that shows colour. Paint after measuring widths."""
        if not text or not self.color or not is_terminal(stream or sys.stdout):
            return text
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Iterable[int] = (),
        red: Container[int] = (),
    ) -> str:
        """Columns two spaces apart; `right` names the columns that hold numbers, `red` the rows that warn.

        On a terminal lines are clipped.
        """
        head, *body = columns([header, *rows], right=right)
        width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
        lines = (_clip(line, width) for line in body)
        return "\n".join(
            [
                self.paint(_clip(head, width), "dim"),
                *(self.paint(line, "red") if row in red else line for row, line in enumerate(lines)),
            ]
        )


def exit_code(error: errors.AdapterctlError) -> int:
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def color_wanted(no_color: bool) -> bool:
    """NO_COLOR (https://no-color.org) counts when it is set and not empty."""
    return not no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def write(stream: TextIO | None, text: str) -> None:
    """One piece of text and its line end; what the stream cannot encode is shown as an escape.

    A stream that the caller closed gets nothing. Raises `Unavailable` where a disk is full.
    """
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever reads has seen enough
            raise
        # else Python tries to write it again when it ends, and complains
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise errors.Unavailable(f"the output cannot be written: {error.strerror}") from error


def as_json(value: Any, *, indent: int = 2) -> str:
    import msgspec  # deferred: help and completion print no JSON

    from ..registry import wire

    text = msgspec.json.format(wire.to_json(value), indent=indent)
    return HOSTILE.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def write_new(path: Path, text: str) -> None:
    """Write a file; one that is there already may be the only good one, and is left alone."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise errors.InvalidInput(f"{path} cannot be written: {error.strerror}", hint="give another file") from error


def as_yaml(value: Any) -> str:
    import yaml  # deferred: only -o yaml and batch files need it

    from ..registry import wire

    return yaml.safe_dump(wire.to_builtins(value), sort_keys=False, allow_unicode=False, width=120)


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Rows as aligned lines without trailing blanks."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(cell_width(row[i]) for row in cells) for i in range(len(cells[0]))]
    numbers = frozenset(right)
    return ["  ".join(_pad(c, widths[i], i in numbers) for i, c in enumerate(row)).rstrip() for row in cells]


def cell_width(text: str) -> int:
    if text.isascii():
        return len(text)
    import unicodedata  # deferred: most tables are ASCII

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - cell_width(text))
    return blanks + text if right else text + blanks


def _clip(line: str, width: int | None) -> str:
    if width is None or cell_width(line) <= width:
        return line
    while cell_width(line) > width - 1:
        line = line[:-1]
    return line + "…"


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())


def _error_object(error: errors.AdapterctlError) -> dict[str, Any]:
    body = {"code": error.code, "message": error.message, "hint": error.hint, "problems": error.problems}
    return {"error": body, "exit_code": exit_code(error)}
