"""How long a person waits: the help, and a whole merge from the command to the registered version."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from adapters import write_pair
from measure import Figure, bench, run_process, take_turns

ADAPTERCTL = [sys.executable, "-m", "adapterctl"]


@bench("help_s", "`adapterctl --help`, less a bare `python -c pass`", unit=" s", at_most=0.15)
def help_s(room: Path) -> Figure:
    bare = [sys.executable, "-c", "pass"]
    rounds = take_turns(
        {"help": lambda: _run([*ADAPTERCTL, "--help"]), "bare": lambda: _run(bare)},
        rounds=11,
    )
    return Figure(
        rounds.median("help") - rounds.median("bare"), f"{rounds.median('help'):.2f} s − {rounds.median('bare'):.2f} s"
    )


@bench(
    "command_vs_import",
    "`adapterctl merge` of a Llama-2-7B q,k,v,o pair, command to registered version, against `import mlflow`",
    unit="×",
    at_most=3,
)
def command_vs_import(room: Path) -> Figure:
    """No supervisor is alive when a round begins, as for the first merge of a day: each round ends with its own."""
    environment = {**os.environ, "ADAPTERCTL_HOME": str(room / "home"), "ADAPTERCTL_IDLE_S": "0"}
    for name, folder in zip(("one", "two"), write_pair(room), strict=True):
        _run([*ADAPTERCTL, "register", str(folder), "--name", name], environment)
    weights = itertools.count(1)  # another recipe each time, for the same one is not merged again

    def merge() -> None:
        _run([*ADAPTERCTL, "merge", f"one=0.{next(weights)}", "two", "--method", "svd"], environment)

    rounds = take_turns({"merge": merge, "import": lambda: _run([sys.executable, "-c", "import mlflow"])}, rounds=5)
    return Figure(
        rounds.ratio("merge", "import"), f"{rounds.median('merge'):.2f} s against {rounds.median('import'):.2f} s"
    )


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    run_process(command, environment)
