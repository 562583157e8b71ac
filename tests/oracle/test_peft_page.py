"""docs/peft.md says what the installed PEFT does: every row of it is carried out again."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import peft
import pytest
from tiny_merge import deltas

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        import peft_faults

    return peft_faults


@pytest.fixture(scope="module")
def found(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list:
    room = tmp_path_factory.mktemp("faults")
    return [faults.find(fault, room / str(place)) for place, fault in enumerate((*faults.SILENT, *faults.SEEN))]


def test_the_page_is_what_a_new_run_writes(faults: ModuleType, found: list):
    assert faults.page(found) == (ROOT / "docs" / "peft.md").read_text(encoding="utf-8"), (
        "run `python bench/peft_faults.py`"
    )
    assert f"PEFT {peft.__version__}" in faults.page(found)


def test_nine_faults_are_silent_and_none_of_them_is_ours(faults: ModuleType, found: list):
    silent = found[: len(faults.SILENT)]

    assert len(silent) == 9
    for fault, row in zip(faults.SILENT, silent, strict=True):
        assert row.theirs > 0.2, f"{fault.name}: PEFT is right now"
        assert row.said == (), f"{fault.name}: PEFT warns now"
        if row.ours is None:
            assert row.does.startswith("refuses it"), fault.name
        else:
            assert row.ours < faults.EXACT, fault.name


def test_the_yardstick_is_the_product_of_the_factors(faults: ModuleType, found: list, tmp_path_factory):
    """Where a parent is plain LoRA, `merge_and_unload` says what s·B·A says."""
    place = len(faults.SILENT)
    folder = next(tmp_path_factory.getbasetemp().glob(f"faults*/{place}/p0"))
    assert faults.SEEN[0].parents[0] == {}, "a plain parent"

    change = {name.removesuffix(".weight"): values for name, values in faults.change(folder).items() if values.any()}

    expected = deltas(folder)
    assert change.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(change[name], delta, rtol=1e-6, atol=1e-7)
