"""What a process loads before it has done anything: the package, the child that merges, and `connect()`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import adapterctl
from adapterctl.registry.domain.errors import NotFound

HEAVY = {"alembic", "mlflow", "numpy", "rich", "sqlalchemy", "torch", "transformers", "typer", "yaml"}


def test_importing_the_package_loads_nothing_heavy(installed: Path):
    assert _loaded_after("import adapterctl", installed) & HEAVY == set()


def test_the_child_that_merges_loads_no_database_and_no_mlflow(installed: Path):
    code = "from adapterctl.workers import engine, receipt, runner"

    assert _loaded_after(code, installed) & {"alembic", "mlflow", "sqlalchemy", "torch", "typer"} == set()


def test_connect_opens_the_home_that_it_is_given(tmp_path: Path):
    registry = adapterctl.connect(tmp_path / "registry")

    assert list(registry.adapters()) == []
    assert (tmp_path / "registry").is_dir()


def test_connect_to_read_makes_nothing(tmp_path: Path):
    registry = adapterctl.connect(tmp_path / "registry", readonly=True)

    with pytest.raises(NotFound):
        registry.adapters()

    assert not (tmp_path / "registry").exists()


def _loaded_after(code: str, installed: Path) -> set[str]:
    report = f"import sys; {code}; print(*sys.modules)"
    environment = {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", report], env=environment, check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in done.stdout.split()}
