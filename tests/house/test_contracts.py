"""Every import contract has teeth: a copy of the house with one bad line breaks exactly that contract."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# contract -> the file that gets one more line, and that line
BREACHES = {
    "1 floors of the house": ("registry/domain/bad.py", "from ... import workers"),
    "2 floors of the registry": ("registry/services/bad.py", "from .. import stores"),
    "3 floors of the workers": ("workers/unlisted.py", "import os"),
    "4 facts, needs and offers know no tool": ("registry/domain/bad.py", "import numpy"),
    "5 the supervisor loads nothing that its child computes with": ("bootstrap.py", "import torch"),
    "6 merge methods do not know each other": ("registry/merging/methods/bad.py", "from . import worse"),
    "7 no circles between siblings": ("cli/commands/bad.py", "from . import worse"),
    "8 what speaks HTTP to the world is in rest": ("registry/services/bad.py", "import fastapi"),
    "9 the client of a server needs the standard library alone": ("registry/rest/problems.py", "import requests"),
}

# What these floors may import beside the standard library. The contracts name tools that are forbidden, also at second
# hand; this names the few that are allowed.
TOOLS = {
    "registry/domain": {"re2", "rfc8785", "uuid6"},
    "registry/merging": {"numpy", "threadpoolctl"},
    "registry/services": {"cryptography", "fast_sugiyama", "matplotlib", "uuid6", "yaml"},
}


@pytest.mark.parametrize("floor", TOOLS)
def test_a_floor_imports_only_the_tools_that_it_may(floor: str, checkout: Path):
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((checkout / floor).rglob("*.py"))]
    imported = {
        name.partition(".")[0]
        for node in (node for tree in trees for node in ast.walk(tree))
        for name in _absolute_imports(node)
    }

    assert imported - sys.stdlib_module_names <= TOOLS[floor]


def test_every_contract_has_its_breach(checkout: Path):
    contracts = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]

    assert {contract["name"] for contract in contracts["contracts"]} == set(BREACHES)


@pytest.mark.parametrize("contract", BREACHES)
def test_a_bad_import_breaks_its_contract(contract: str, checkout_copy: Path, tmp_path: Path):
    house = tmp_path / "adapterctl"
    shutil.copytree(checkout_copy, house, ignore=shutil.ignore_patterns("tests", "docs", "*.safetensors"))
    path, line = BREACHES[contract]
    with (house / path).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    if "worse" in line:
        (house / path).with_name("worse.py").write_text("from . import bad\n")

    done = _lint(house)

    assert done.returncode == 1
    assert contract in re.findall(r"^(.+) BROKEN$", done.stdout, flags=re.MULTILINE)


def test_the_house_as_it_stands_keeps_all_contracts(checkout_copy: Path, tmp_path: Path):
    house = tmp_path / "adapterctl"
    shutil.copytree(checkout_copy, house, ignore=shutil.ignore_patterns("tests", "docs", "*.safetensors"))

    done = _lint(house)

    assert done.returncode == 0, done.stdout


def _lint(house: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(house.parent)}
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True)


def _absolute_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []
