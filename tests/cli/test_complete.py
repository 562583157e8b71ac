"""Completion as bash asks for it: pieces of words, one a line. Silent whatever goes wrong, and nothing heavy loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from many import fill

from adapterctl.cli.complete import glue
from adapterctl.registry.stores.sql.ledger import SqlLedger

PROGRAM = "from adapterctl.cli.main import main; main()"
HEAVY = ("alembic", "mlflow", "msgspec", "numpy", "rich", "sqlalchemy", "torch", "transformers", "yaml")


def complete(*pieces: str, program: str = PROGRAM, **environment: str) -> list[str]:
    """What bash is offered for the last of these pieces."""
    asked = {"_ADAPTERCTL_COMPLETE": "complete_bash", "COMP_CWORD": str(len(pieces))}
    words = {"COMP_WORDS": "\n".join(["adapterctl", *pieces])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asked | words | environment
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture(scope="module")
def at_home(family: Path) -> dict[str, str]:
    return {"ADAPTERCTL_HOME": str(family)}


@pytest.mark.parametrize(
    ("pieces", "answers"),
    [
        (["show", "tr"], ["translate", "translate-chat"]),
        (["show", "translate", ":"], ["v2", "v1"]),
        (["show", "translate", ":", "v2"], ["v2"]),
        (["promote", "chat", "@"], ["staging", "production"]),
        (["promote", "chat", "@", "p"], ["production"]),
        (["promote", "chat", ":", "v1", "--to", "s"], ["staging"]),
        (["merge", "translate", ":", "v2", "=", "0.5", "ch"], ["chat"]),
        (["merge", "translate", ":", "v2", "chat", ":"], ["v1"]),
        (["register", "folder", "--name", "c"], ["chat"]),
        (["history", "transl"], ["translate", "translate-chat"]),
        (["eval", "tr"], ["translate", "translate-chat"]),
        (["eval", "run", "chat", "tr"], ["translate", "translate-chat"]),
        (["show", "%"], []),
        (["prom"], ["promote"]),
    ],
)
def test_names_versions_and_stages_are_offered(pieces: list[str], answers: list[str], at_home: dict[str, str]):
    assert complete(*pieces, **at_home) == answers


def test_an_old_version_of_many_is_offered_once_its_number_is_begun(sql_ledger: SqlLedger, home: Path):
    fill(sql_ledger._db, adapters=300, each=1)

    newest, begun = (complete("show", "large", ":", start, ADAPTERCTL_HOME=str(home)) for start in ("", "v4"))

    assert (newest[0], newest[-1], len(newest)) == ("v300", "v101", 200)
    assert begun == [*(f"v{number}" for number in range(49, 39, -1)), "v4"]


def test_jobs_are_offered(at_home: dict[str, str]):
    assert len(complete("jobs", "wait", "", **at_home)) == 1


def test_the_home_may_be_an_option(family: Path):
    assert complete("--home", str(family), "show", "ch") == ["chat"]


@pytest.mark.parametrize("content", [None, b"", b"no database", b"SQLite format 3\0" + bytes(4096)])
def test_a_home_without_a_sound_ledger_offers_nothing_and_says_nothing(content: bytes | None, home: Path):
    if content is not None:
        (home / "registry.db").write_bytes(content)

    assert complete("show", "tr") == []


def test_settings_that_are_wrong_offer_nothing_and_say_nothing(family: Path):
    assert complete("show", "tr", ADAPTERCTL_HOME=str(family), ADAPTERCTL_LEASE_S="soon") == []


def test_completion_loads_nothing_heavy(at_home: dict[str, str]):
    report = f"print(*sorted(set({HEAVY!r}) & {{n.partition('.')[0] for n in sys.modules}}))"

    assert complete(
        "show", "ch", program=f"import sys, atexit; atexit.register(lambda: {report}); {PROGRAM}", **at_home
    ) == ["chat"]


@pytest.mark.parametrize(
    ("pieces", "current", "glued"),
    [
        (["a", "b"], 1, (["a", "b"], 1, 0)),
        (["a", "n", ":"], 2, (["a", "n:"], 1, 2)),
        (["a", "n", ":", "v"], 3, (["a", "n:v"], 1, 2)),
        (["a", "n", ":", "v", "=", "1", ""], 6, (["a", "n:v=1", ""], 2, 0)),
        (["a", "--to", "=", "p", "later"], 3, (["a", "--to=p"], 1, 5)),
        (["a", ":"], 1, (["a:"], 0, 2)),
    ],
)
def test_pieces_become_words(pieces: list[str], current: int, glued: tuple[list[str], int, int]):
    assert glue(pieces, current) == glued


def test_bash_itself_completes(at_home: dict[str, str], tmp_path: Path):
    program = tmp_path / "adapterctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m adapterctl "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(adapterctl --show-completion bash)"; COMP_WORDS=(adapterctl show translate : "v"); COMP_CWORD=4;'
        ' _adapterctl_completion adapterctl; echo "${COMPREPLY[*]}"'
    )
    environment = os.environ | at_home | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)

    assert (done.stdout.split(), done.stderr) == (["v2", "v1"], "")
