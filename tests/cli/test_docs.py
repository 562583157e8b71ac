"""The tables of the docs name everything there is: commands, exit codes, errors, settings, conditions."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.main import get_command

from adapterctl.cli.main import app
from adapterctl.cli.output import EXIT_CODES, INTERRUPTED
from adapterctl.registry.domain.gate import GATE_KEYS, SUBJECTS, check_gates
from adapterctl.registry.domain.verdict import Outcome
from adapterctl.registry.rest.problems import STATUS
from adapterctl.registry.settings import Settings, load_settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: first cell without backticks to the other cells."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"# {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert table is not None
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()[2:]]
    return {row[0].replace("`", ""): row[1:] for row in cells}


def test_every_command_has_its_row():
    documented = {words.split()[0] for words in rows("cli.md", "Commands")}

    assert documented == set(get_command(app).commands)


@pytest.mark.parametrize("group", ["jobs", "base", "suite", "gate"])
def test_every_command_of_a_group_is_named(group: str):
    (row,) = [words for words in rows("cli.md", "Commands") if words.split()[0] == group]

    assert set(get_command(app).commands[group].commands) <= set(re.findall(r"\w+", row))


def test_every_exit_code_has_its_row():
    assert set(rows("cli.md", "Exit codes")) == {"0", str(INTERRUPTED), *map(str, EXIT_CODES.values())}


def test_every_error_over_rest_stands_beside_its_status():
    table = rows("rest.md", "Errors")

    # the first column may hold several statuses
    missing = {
        kind.code: status
        for kind, status in STATUS.items()
        if not any(str(status) in statuses and f"`{kind.code}`" in codes for statuses, (codes,) in table.items())
    }
    assert missing == {}


def test_the_example_of_the_gates_page_is_right_and_its_tables_name_everything():
    page = (DOCS / "gates.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)

    assert len(check_gates(yaml.safe_load(example), stages=("staging", "production"))) == 3
    assert set(rows("gates.md", "Keys of a gate")) == set(GATE_KEYS)
    assert set(rows("gates.md", "Conditions")) >= set(SUBJECTS)
    assert set(rows("gates.md", "Three verdicts")) == set(get_args(Outcome))


def test_every_setting_has_its_row_with_its_default(tmp_path: Path):
    documented = rows("settings.md", "Settings")
    defaults = load_settings({}, env={}, cwd=tmp_path, user_file=tmp_path / "none")

    assert list(documented) == [field.name for field in fields(Settings)]
    for name, (shown, _) in documented.items():
        value = getattr(defaults, name)
        if isinstance(value, int | float):
            assert float(shown) == value
        if name in ("stages", "mlflow_ui"):
            assert shown.strip("`") == (", ".join(value) if isinstance(value, tuple) else value)
