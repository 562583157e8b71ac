"""Running the program: in this process for what it says, in a fresh one for what it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from adapterctl.cli.main import app


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str

    @property
    def data(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def run() -> Callable[..., Ran]:
    """`run("ls", "-o", "json")` as typed after `adapterctl`; what is not an exit code is raised."""

    def invoke(*words: str, code: int | None = 0) -> Ran:
        result = CliRunner().invoke(app, list(words), prog_name="adapterctl", catch_exceptions=False)
        ran = Ran(result.exit_code, result.stdout, result.stderr)
        assert code is None or ran.code == code, (
            f"adapterctl {' '.join(words)}: exit {ran.code}\n{ran.stdout}{ran.stderr}"
        )
        return ran

    return invoke


@pytest.fixture
def fresh() -> Callable[..., Ran]:
    """The same in a new process, through the entry point of the console script."""

    def start(*words: str, stdin: str | None = None) -> Ran:
        done = subprocess.run(
            [sys.executable, "-c", "from adapterctl.cli.main import main; main()", *words],
            capture_output=True,
            text=True,
            input=stdin,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return start
