"""The help: one golden page a command, a working example in each, and nothing heavy loaded to print it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.main import get_command

from adapterctl.cli.main import app

HEAVY = {
    "alembic",
    "celery",
    "lm_eval",
    "mlflow",
    "msgspec",
    "numpy",
    "rich",
    "sqlalchemy",
    "torch",
    "transformers",
    "yaml",
}
PROGRAM = get_command(app)


def pages(command: Any = PROGRAM, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from pages(below, (*words, name))


def example(text: str) -> str:
    return re.sub(r"\s+", " ", text.partition("Example: ")[2].partition("\n\n")[0]).strip()


def invocations(line: str) -> list[list[str]]:
    """The arguments of every `adapterctl` in a line of shell; what comes out of another one is `ID`."""
    inner = re.findall(r'"\$\((.*?)\)"', line)
    outer = re.sub(r'"\$\(.*?\)"', "ID", line).split(" | ")
    calls = [f"{part.removeprefix('xargs ')} ID" if part.startswith("xargs ") else part for part in outer]
    return [shlex.split(call.removeprefix("adapterctl ")) for call in (*inner, *calls)]


def parse(words: list[str]) -> None:
    """Raises a usage error unless the program understands these words; runs nothing."""
    command = PROGRAM
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(command.name, words)


@pytest.mark.parametrize("words", list(pages()), ids=lambda words: "-".join(words) or "adapterctl")
def test_help_is_as_it_was(words: tuple[str, ...], run, golden: Callable[[str, str], None], monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    ran = run(*words, "--help")

    golden(f"help/{'-'.join(words) or 'adapterctl'}.txt", ran.stdout)


@pytest.mark.parametrize("words", [w for w in pages() if w], ids="-".join)
def test_help_starts_with_a_verb_and_ends_with_an_example_that_parses(words: tuple[str, ...], run):
    text = run(*words, "--help").stdout
    if "Commands:" in text:
        return

    first = text.split("\n\n")[1].split()[0]
    calls = invocations(example(text))

    assert re.fullmatch(r"[A-Z][a-z]*[a-rt-z]", first)
    assert any(call[: len(words)] == list(words) for call in calls)
    for call in calls:
        parse(call)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['adapterctl', '--help']\nfrom adapterctl.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("Usage: adapterctl")
    assert HEAVY.intersection(done.stderr.split()) == set()


def test_an_unknown_command_is_a_usage_error_with_a_suggestion(run):
    ran = run("promot", code=2)

    assert "Did you mean 'promote'" in ran.stderr
    assert ran.stdout == ""


def test_version_is_printed(run):
    assert re.fullmatch(r"adapterctl \d+\.\d+\.\d+\n", run("--version").stdout)
