"""Running the program: in this process for what it says, in a fresh one for what it loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from registries import WorkHere
from tiny import write_tiny_adapter
from typer.testing import CliRunner

from adapterctl.cli.main import app
from adapterctl.registry.stores import spawn_bell


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


@pytest.fixture(autouse=True)
def short_lived_supervisor(work_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are done by the command that queues them; what a fresh process starts ends soon after its last job."""
    monkeypatch.setenv("ADAPTERCTL_IDLE_S", "0.2")


@pytest.fixture
def pair(
    run: Callable[..., Ran],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    home: Path,
    ledger_schema: Path,
    mlflow_schema: Path,
) -> Path:
    """translate:v1 and chat:v1 in the home of this test; its tables are copied, not made."""
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    run("register", str(tiny_adapter(tmp_path / "translate", seed=1)), "--name", "translate")
    run("register", str(tiny_adapter(tmp_path / "chat", seed=2)), "--name", "chat")
    return home


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, ledger_schema: Path, mlflow_schema: Path) -> Path:
    """A home with translate:v1 and v2 (trained from v1), chat:v1 and a cat of the newer two. Shared: read it only."""
    home, folder = tmp_path_factory.mktemp("family"), tmp_path_factory.mktemp("adapters")
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    for seed, name in enumerate(("translate-1", "translate-2", "chat-1"), start=1):
        write_tiny_adapter(folder / name, seed=seed)
    about = ["--license", "apache-2.0", "--dataset", "wmt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn_bell, "SpawnBell", WorkHere)
        for words in (
            ["register", str(folder / "translate-1"), "--name", "translate", "--metric", "bleu=0.29"],
            ["register", str(folder / "translate-2"), "--name", "translate", "--metric", "bleu=0.31",
             "--from", "translate:v1", "--tag", "team=mt", "--param", "lr=0.001", *about],
            ["register", str(folder / "chat-1"), "--name", "chat"],
            ["merge", "translate:v2", "chat:v1", "--method", "cat"],
        ):  # fmt: skip
            done = CliRunner().invoke(app, ["--home", str(home), *words], catch_exceptions=False)
            assert done.exit_code == 0, done.stderr
    return home


@pytest.fixture
def read(family: Path, run: Callable[..., Ran]) -> Callable[..., Ran]:
    """`run` on the shared family."""
    return lambda *words, **options: run("--home", str(family), *words, **options)
