"""A copy of the checkout and the wheel built from it: what a stranger gets, away from this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkout() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkout_copy(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout in a folder whose name is no Python name, as a clone may well have."""
    copy = tmp_path_factory.mktemp("copy") / "a-b.1"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info"))
    return copy


@pytest.fixture(scope="session")
def wheel(checkout_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(checkout_copy)]
    subprocess.run([*pip, *build], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the installed wheel; it goes before any installation of this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True)
    return folder
