"""The batch file of the demo says what the shipped adapters and their model cards say."""

from __future__ import annotations

import re
from pathlib import Path

from adapterctl.cli.batch import read_batch

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"


def test_every_shipped_adapter_is_registered_with_the_figures_of_its_card():
    entries = read_batch(ADAPTERS / "batch.yaml")

    shipped = {path.parent for path in ADAPTERS.glob("*/*/adapter_config.json")}
    assert {Path(entry.source) for entry in entries} == shipped
    assert len(entries) == len(shipped)
    for entry in entries:
        card = (Path(entry.source) / "README.md").read_text(encoding="utf-8")
        (loss,) = re.findall(r"fp32\): ([\d.]+);", card)
        (step,) = re.findall(r"checkpoint after step (\d+)", card)
        assert entry.metrics == {"heldout_nll": float(loss)}
        assert entry.params["step"] == int(step)


def test_every_version_but_the_first_comes_from_the_one_before():
    newest: dict[str, int] = {}

    for entry in read_batch(ADAPTERS / "batch.yaml"):
        before = newest.get(entry.name, 0)
        assert entry.trained_from == (f"{entry.name}:v{before}" if before else None)
        assert entry.source.endswith(f"{entry.name}/v{before + 1}")
        newest[entry.name] = before + 1

    assert newest == {"translate": 3, "chat": 5}
