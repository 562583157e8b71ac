"""docs/intake.md names every code that the intake can answer with, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (
    "registry/domain/header.py",
    "registry/domain/adapter.py",
    "registry/domain/lora_config.py",
    "registry/domain/lycoris.py",
    "registry/merging/lycoris.py",
    "registry/merging/tensors.py",
    "registry/services/register.py",
)
#: How a code stands in the sources: first argument of a refusal or finding, or beside the magic bytes of a file.
CODE = re.compile(
    r"(?:_refuse|_?Refusal|_fault|findings\.add|Problem)\(\s*\"([a-z_]+)\"|^    \(b\".*?\", \"([a-z_]+)\"", re.MULTILINE
)


def test_every_code_is_documented_and_every_documented_code_exists():
    found = {a or b for name in SOURCES for a, b in CODE.findall((ROOT / name).read_text(encoding="utf-8"))}
    found |= {"missing_lora_a", "missing_lora_b"}  # made from the side that is missing
    table = (ROOT / "docs/intake.md").read_text(encoding="utf-8").partition("## Codes")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]

    assert {code for cell in first_cells for code in re.findall(r"`(\w+)`", cell)} == found
