"""What comes as files: copies and merges that somebody brings are held to their parents, and a recall finds them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import header_bytes, write_tiny_adapter

from adapterctl.registry.api import VersionView
from adapterctl.registry.domain.digest import json_digest
from adapterctl.registry.domain.errors import IncompatibleParents, Recalled
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.domain.tuning import TuneRequest
from adapterctl.registry.services.carry import LISTING, export, read_family, take_in
from adapterctl.registry.services.local import LocalRegistry

WEIGHTS = "adapter_model.safetensors"
PARENTS = [("translate:v1", 0.5, "imported"), ("chat:v1", 1.0, "imported")]
_changes = itertools.count(1)
Change = Callable[[dict[str, str]], dict[str, str]]


@pytest.fixture(scope="module")
def omni(two_parents: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of omni:v1, half of translate:v1 and chat:v1."""
    request = MergeRequest((parse_parent("translate:v1=0.5"), parse_parent("chat:v1")), into="omni")
    list(two_parents.follow(two_parents.merge(request).job.id, timeout_s=120))
    two_parents.pull(parse_ref("omni:v1"), folder := tmp_path_factory.mktemp("pulled") / "omni")
    return folder


def brought(source: Path, folder: Path, *, header: Change = lambda header: header, other_bytes: bool = False) -> Path:
    """The same adapter with another header, and where wanted with weights that nobody has seen."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    content = (source / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    entries["__metadata__"] = header(entries["__metadata__"])
    body = bytearray(content[end:])
    if other_bytes:
        body[-4] ^= next(_changes)
    (folder / WEIGHTS).write_bytes(header_bytes(json.dumps(entries).encode()) + body)
    return folder


def edges(version: VersionView) -> list[tuple[str, float | None, str]]:
    return [(parent.ref, parent.weight, parent.kind) for parent in version.parents]


def test_a_copy_has_the_parents_of_what_it_copies_whatever_its_header_says(two_parents, omni, tmp_path):
    folder = brought(omni, tmp_path / "bare", header=lambda header: {})

    made = two_parents.register(str(folder), name="copy")

    assert edges(made.version) == PARENTS
    assert "made of translate:v1, chat:v1, it has the bytes of omni:v1" in made.warnings[0]
    assert two_parents.register(str(folder), name="copy").warnings == ()


def test_a_merged_file_with_other_bytes_has_the_parents_that_its_header_names(two_parents, omni, tmp_path):
    folder = brought(omni, tmp_path / "altered", other_bytes=True)

    made = two_parents.register(str(folder), name="altered", kind="train", trained_from=parse_ref("chat:v1"))

    # what the caller states comes first and is not said twice
    assert edges(made.version) == [("chat:v1", None, "trained_from"), PARENTS[0]]
    assert "its header says so" in made.warnings[0]


@pytest.mark.parametrize(
    ("recipe", "warned"),
    [
        ([], True),
        ({"method": "cat"}, True),
        ({"parents": []}, True),
        ({"parents": [{"digest": "", "weight": 1.0}]}, True),  # the beginning of every digest
        ({"parents": [{"digest": "f" * 63 + "G", "weight": 1.0}]}, True),
        ({"digest": "0" * 64}, True),  # of another recipe than that beside it
        ({"parents": [{"digest": "e" * 64, "weight": 1.0}]}, False),  # a fine recipe of what is not here
    ],
)
def test_a_header_that_names_nothing_known_is_told_and_taken_for_nothing(two_parents, omni, tmp_path, recipe, warned):
    def change(header: dict[str, str]) -> dict[str, str]:
        whole = json.loads(header["adapterctl.recipe"]) | recipe if "parents" in recipe else recipe
        digest = recipe["digest"] if "digest" in recipe else json_digest(whole)
        text = header["adapterctl.recipe"] if "digest" in recipe else json.dumps(whole)
        return {"adapterctl.recipe": text, "adapterctl.recipe_digest": digest}

    folder = brought(omni, tmp_path / "odd", header=change, other_bytes=True)

    made = two_parents.register(str(folder), name=f"odd-{json_digest(recipe)[:8]}")

    assert edges(made.version) == []
    assert any("nothing is taken from it" in warning for warning in made.warnings) == warned


def test_gates_on_receipt_and_retention_hold_for_a_merge_that_was_brought(two_parents, omni, tmp_path):
    two_parents.register(str(brought(omni, tmp_path / "gated", header=lambda header: {})), name="gated")
    lines = ["retention.min >= 0.9", "receipt.loss <= 1"]
    two_parents.set_gates({"gates": [{"stage": "production", "receipt": "passed", "require": lines}]})
    try:
        asked = {name: two_parents.gate_check(parse_ref(name), to="production") for name in ("gated", "chat", "omni")}
    finally:
        two_parents.set_gates({"gates": []})

    checks = {name: {each.condition: each.verdict for each in check.conditions} for name, check in asked.items()}
    assert {line: checks["gated"][line] for line in (*lines, "receipt: passed")} == {
        "retention.min >= 0.9": "failed", "receipt.loss <= 1": "failed", "receipt: passed": "failed",
    }  # fmt: skip
    assert set(checks["chat"].values()) == {"passed"}  # no parents, no merge: nothing to lose and nothing to prove
    assert checks["omni"]["receipt: passed"] == "passed"


def test_a_recall_follows_the_bytes_through_copies_and_what_is_made_of_them(two_parents, omni, tmp_path):
    source = write_tiny_adapter(tmp_path / "leaky", seed=91)
    two_parents.register(str(source), name="leaky")
    two_parents.register(str(source), name="twin", base="another/base")
    request = MergeRequest((parse_parent("chat:v1"), parse_parent("translate:v1=2")), into="sound")
    list(two_parents.follow(two_parents.merge(request).job.id, timeout_s=120))
    trained = str(write_tiny_adapter(tmp_path / "later", seed=92))
    two_parents.register(trained, name="later", kind="train", trained_from=parse_ref("twin:v1"))
    two_parents.promote(parse_ref("twin:v1"), to="production")

    impact = two_parents.recall(parse_ref("leaky:v1"), reason="leaked")

    assert (impact.descendants, [hit.ref for hit in impact.stages]) == (("twin:v1", "later:v1"), ["twin:v1"])
    assert two_parents.version(parse_ref("later:v1")).recall.ref == "leaky:v1"
    assert two_parents.version(parse_ref("sound:v1")).recall is None
    for name in ("twin", "later"):
        with pytest.raises(Recalled, match=f"{name}:v1 is made of leaky:v1, which was recalled: leaked"):
            two_parents.promote(parse_ref(f"{name}:v1"), to="staging", reason="urgent", force=True)
    two_parents.demote("twin", stage="production")

    two_parents.remove(parse_ref("leaky:v1"), reason="gone")  # its bytes are no better for it

    for name in ("leaky", "third"):
        with pytest.raises(Recalled, match="leaky:v1 was recalled"):
            two_parents.register(str(source), name=name)
    freed = two_parents.undo_recall(parse_ref("leaky:v1"), reason="it was another set")
    assert freed.descendants == ("twin:v1", "later:v1")
    assert two_parents.promote(parse_ref("twin:v1"), to="production").ref == "twin:v1"


def test_a_merge_of_a_recalled_parent_is_hit_however_it_came_and_refused_when_it_comes_later(
    two_parents, omni, tmp_path
):
    before = brought(omni, tmp_path / "before", other_bytes=True)
    two_parents.register(str(before), name="before")
    family = tmp_path / "family"
    export(two_parents, [parse_ref("omni:v1")], family)
    two_parents.recall(parse_ref("chat:v1"), reason="leaked")
    try:
        for force in (False, True):
            with pytest.raises(Recalled, match="before:v1 is made of chat:v1, which was recalled"):
                two_parents.promote(parse_ref("before:v1"), to="production", reason="urgent", force=force)
        with pytest.raises(Recalled, match=":v1 is made of chat:v1"):  # bytes that are here, without a header
            two_parents.register(str(brought(omni, tmp_path / "bare", header=lambda header: {})), name="after")

        (family / LISTING).unlink()
        (family / "omni" / "v1").rename(family / "elsewhere")
        with pytest.raises(IncompatibleParents, match="chat:v1 was recalled"):  # the merge would be made again
            list(take_in(two_parents, read_family(family)))
        with pytest.raises(Recalled, match=":v1 is made of chat:v1"):  # and so as a plain import
            list(take_in(two_parents, read_family(family), unproven=True))
        with pytest.raises(IncompatibleParents, match="chat:v1 was recalled"):
            two_parents.tune(TuneRequest((parse_ref("translate"), parse_ref("chat")), suites=(), budget=6, keep=1))
        new = brought(omni, tmp_path / "new", other_bytes=True)
        with pytest.raises(Recalled, match="this file, by its header, is made of chat:v1, which was recalled: leaked"):
            two_parents.register(str(new), name="after")
    finally:
        two_parents.undo_recall(parse_ref("chat:v1"), reason="the test is over")
    assert two_parents.history("before").events == ()
