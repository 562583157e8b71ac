"""Where a base model is looked for, and in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adapterctl
from adapterctl.registry.domain.errors import InvalidInput, Misconfigured, Refused, Unavailable
from adapterctl.registry.domain.version import Base
from adapterctl.registry.services.bases import fingerprints
from adapterctl.registry.services.locate_base import (
    WEIGHTS_SEEN,
    check_weights,
    locate_base,
    quantised_to,
    remember_base,
)
from adapterctl.registry.settings import load_settings

BASE = Base("org/model", "org/model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--org--model"


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def _find(home: Path, base: Base = BASE, spellings: tuple[str, ...] = (), paths: tuple[str, ...] = ()) -> Path:
    return locate_base(
        base, spellings, home=home, base_paths=paths, made_on_demand={"made": "json", "not-made": "not_installed"}
    )


def test_the_setting_wins_over_the_home_and_the_home_over_the_cache(home: Path, cache: Path, tmp_path: Path):
    cached = _model(cache / "snapshots" / "c0ffee")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    assert _find(home) == cached

    own = _model(home / "bases" / "org" / "model")
    assert _find(home) == own

    configured = _model(tmp_path / "configured")
    assert _find(home, paths=(f"org/model={configured}",)) == configured


def test_a_pinned_revision_is_not_replaced_by_the_newest(home: Path, cache: Path):
    _model(cache / "snapshots" / "newer")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("newer")

    with pytest.raises(Unavailable):
        _find(home, Base("org/model@older", "org/model@older", revision="older"))

    pinned = _model(cache / "snapshots" / "older")
    assert _find(home, Base("org/model@older", "org/model@older", revision="older")) == pinned


def test_an_alias_leads_to_the_folder_too(home: Path, cache: Path):
    own = _model(home / "bases" / "short-name")

    assert _find(home, spellings=("short-name",)) == own


def test_a_remembered_folder_is_found_and_can_be_turned(home: Path, cache: Path, tmp_path: Path):
    first, second = _model(tmp_path / "first"), _model(tmp_path / "second")

    remember_base(home, "org/model", first)
    assert _find(home).resolve() == first

    remember_base(home, "org/model", second)
    assert _find(home).resolve() == second


def test_a_base_that_was_added_with_its_folder_is_found_there(tmp_path: Path, cache: Path):
    registry = adapterctl.connect(tmp_path / "home")
    folder = _model(tmp_path / "somewhere")

    base = registry.add_base("org/model", folder=folder)

    assert _find(tmp_path / "home", base).resolve() == folder


def test_other_weights_are_not_the_base_that_was_pinned_and_are_hashed_once(home: Path, tmp_path: Path):
    folder = _model(tmp_path / "pinned")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"those that were pinned")
    base = Base("org/model", "org/model", **fingerprints(folder))

    check_weights(base, folder, home)
    memory = home / WEIGHTS_SEEN
    before = memory.stat()
    check_weights(base, folder, home)
    assert memory.stat().st_mtime_ns == before.st_mtime_ns
    assert memory.stat().st_ino == before.st_ino

    weights.write_bytes(b"quite another model, of the same config")
    with pytest.raises(Refused, match="the weights differ"):
        check_weights(base, folder, home)
    with pytest.raises(Refused, match="the weights differ"):  # remembered too
        check_weights(base, folder, home)
    weights.write_bytes(b"those that were pinned")
    memory.write_text("not JSON")
    check_weights(base, folder, home)
    check_weights(BASE, folder, home)  # not pinned to any weights


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b/c", "..", "a/.."])
def test_a_name_is_never_a_way_out_of_the_home(home: Path, cache: Path, name: str):
    _model(home / "b")
    (home / "config.json").write_text("{}")

    with pytest.raises(Unavailable):
        _find(home / "b", Base(name, name))


def test_a_base_that_is_made_on_demand_has_its_place(home: Path, cache: Path):
    assert _find(home, Base("made", "made")) == home / "bases" / "made"


def test_what_it_is_made_from_must_be_installed(home: Path, cache: Path):
    with pytest.raises(Unavailable) as refusal:
        _find(home, Base("not-made", "not-made"))

    assert refusal.value.hint == "pip install --no-deps not-installed"


def test_a_setting_that_is_no_pair_is_refused(home: Path, cache: Path):
    with pytest.raises(InvalidInput):
        _find(home, paths=("/some/folder",))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4"),
        (
            {
                "quantization_config": {
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_use_double_quant": True,
                }
            },
            "nf4-dq",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "fp4"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "int8"),
        ({"quantization_config": {"quant_method": "GPTQ/../x"}}, "gptqx"),
        ([], None),
    ],
)
def test_what_a_base_is_quantised_to_is_read_from_its_config(config: Any, dtype: str | None, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert quantised_to(tmp_path) == dtype


def test_a_base_that_is_yet_to_be_made_is_not_quantised(tmp_path: Path):
    assert quantised_to(tmp_path / "none") is None


def test_a_setting_that_names_no_dtype_is_refused(home: Path):
    with pytest.raises(Misconfigured, match="eval_dtype is 'int3', expected float32, nf4, nf4-dq"):
        load_settings({"home": home}, env={"ADAPTERCTL_EVAL_DTYPE": "int3"})
