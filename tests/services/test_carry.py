"""Portable lineage: a family goes to an empty home as folders and is there what it was, digest for digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from registries import WorkHere
from tiny import header_bytes, write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.digest import json_digest
from adapterctl.registry.domain.errors import InvalidAdapter, Refused
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.carry import LISTING, export, read_family, take_in
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import load_settings

WEIGHTS = "adapter_model.safetensors"


def merge(registry: LocalRegistry, into: str, *parents: str) -> None:
    submitted = registry.merge(MergeRequest(tuple(map(parse_parent, parents)), into=into))
    list(registry.follow(submitted.job.id, timeout_s=120))


@pytest.fixture(scope="module")
def family(two_parents: LocalRegistry, tmp_path_factory) -> Path:
    """The export of top:v1 of omni:v1 and translate:v2; omni:v1 of chat:v1 and translate:v1; v2 trained from v1."""
    two_parents.register(
        str(write_tiny_adapter(tmp_path_factory.mktemp("t2"), seed=50, rank=2)),
        name="translate",
        kind="train",
        trained_from=parse_ref("translate:v1"),
        metrics={"bleu": 0.31},
        dataset="wmt",
    )
    merge(two_parents, "omni", "chat:v1=0.25", "translate:v1")
    merge(two_parents, "top", "omni:v1=2", "translate:v2=-0.5")
    folder = tmp_path_factory.mktemp("export") / "family"
    assert [each.ref for each in export(two_parents, [parse_ref("top")], folder)] == [
        "chat:v1", "omni:v1", "top:v1", "translate:v1", "translate:v2",
    ]  # fmt: skip
    return folder


@pytest.fixture
def new_home(tmp_path: Path, ledger_schema: Path, mlflow_schema: Path) -> LocalRegistry:
    home = tmp_path / "new"
    home.mkdir()
    shutil.copy(ledger_schema, home / "registry.db")
    shutil.copy(mlflow_schema, home / "mlflow.db")
    registry = connect(load_settings({"home": home, "idle_s": 0.3}))
    registry.bell = WorkHere(registry.settings)
    return registry


@pytest.fixture
def copied(family: Path, tmp_path: Path) -> Path:
    return shutil.copytree(family, tmp_path / "family")


def graph(registry: LocalRegistry) -> dict[str, object]:
    """What must be the same: contents, files, recipes, and the edges with their order, kinds and weights."""
    versions = registry.ledger.versions()
    labels = {version.id: version.label for version in versions}
    edges = registry.ledger.parent_edges(list(labels))
    return {
        version.label: (
            version.spec.kind,
            version.spec.content_digest,
            version.spec.recipe_digest,
            sorted((file.path, file.sha256) for file in version.placement.files if file.path != "MLmodel"),
            [
                (edge.position, labels[edge.parent_id], edge.kind, edge.weight, edge.recipe_digest)
                for edge in edges.get(version.id, ())
            ],
        )
        for version in versions
    }


def test_a_family_is_the_same_in_an_empty_home_and_is_found_the_second_time(two_parents, family, new_home):
    planned = list(take_in(new_home, read_family(family), dry_run=True))
    assert new_home.ledger.versions() == []

    done = list(take_in(new_home, read_family(family)))

    assert graph(new_home) == graph(two_parents)
    assert [each.action for each in done] == [each.action for each in planned]
    assert sorted(each.action for each in done) == ["merge"] * 2 + ["register"] * 3
    assert new_home.version(parse_ref("top")).receipt["loss"] == two_parents.version(parse_ref("top")).receipt["loss"]
    trained = new_home.version(parse_ref("translate:v2"))
    assert (trained.metrics, trained.dataset) == ({"bleu": 0.31}, "wmt")
    assert trained.imported == {"bleu": f"imported from {LISTING}"}
    assert {each.action for each in take_in(new_home, read_family(family))} == {"found"}
    merged = new_home.merge(MergeRequest(tuple(map(parse_parent, ["chat:v1=0.25", "translate:v1"])), into="omni"))
    assert (merged.job, merged.version.ref) == (None, "omni:v1")
    assert len(new_home.ledger.versions()) == 5


def test_a_changed_header_is_refused_and_headers_alone_tell_every_edge_of_a_merge(two_parents, copied, new_home):
    (copied / LISTING).unlink()
    path = copied / "omni" / "v1" / WEIGHTS
    whole = path.read_bytes()
    recipe = json.loads(header(path)["adapterctl.recipe"])
    recipe["parents"][0]["weight"] = 0.75
    rewrite(path, {"adapterctl.recipe": json.dumps(recipe)})
    with pytest.raises(InvalidAdapter, match=r"omni/v1: .* stands beside it"):
        list(take_in(new_home, read_family(copied)))
    assert new_home.ledger.versions() == []

    rewrite(path, {"adapterctl.recipe_digest": json_digest(recipe)})  # a liar who knows the format
    with pytest.raises(Refused, match="omni/v1: the recipe gives the content"):
        list(take_in(new_home, read_family(copied)))
    assert {version.name for version in new_home.ledger.versions()} == {"chat", "translate"}

    path.write_bytes(whole)
    list(take_in(new_home, read_family(copied)))
    expected = graph(two_parents)
    kind, *same, edges = expected["translate:v2"]
    assert (kind, edges[0][2]) == ("train", "trained_from")
    expected["translate:v2"] = ("import", *same, [])
    assert graph(new_home) == expected


def test_a_parent_that_is_nowhere_is_named(copied, new_home):
    for folder in ("chat", "top", "translate/v2"):
        shutil.rmtree(copied / folder)
    digest = json.loads(header(copied / "omni" / "v1" / WEIGHTS)["adapterctl.recipe"])["parents"][0]["digest"]

    done = {each.ref: each for each in take_in(new_home, read_family(copied))}

    assert done["omni:v1"].action == "register"
    assert digest in done["omni:v1"].warnings[0]
    assert new_home.version(parse_ref("omni:v1")).kind == "import"
    assert {each.action for each in take_in(new_home, read_family(copied))} == {"found"}


def test_what_its_recipe_does_not_make_is_taken_in_on_demand_as_a_plain_import(copied, new_home):
    for folder in ("top", "translate/v2"):
        shutil.rmtree(copied / folder)
    path = copied / "omni" / "v1" / WEIGHTS
    recipe = {**json.loads(header(path)["adapterctl.recipe"]), "method_rev": 99}
    rewrite(path, {"adapterctl.recipe": json.dumps(recipe), "adapterctl.recipe_digest": json_digest(recipe)})
    with pytest.raises(Refused, match="omni/v1: these parents and options make the recipe"):
        list(take_in(new_home, read_family(copied)))

    done = {each.ref: each for each in take_in(new_home, read_family(copied), unproven=True)}

    assert done["omni:v1"].action == "register"
    assert "taken in as a plain import: these parents and options" in done["omni:v1"].warnings[0]
    taken = new_home.version(parse_ref("omni:v1"))
    assert (taken.kind, taken.recipe_digest) == ("import", None)
    assert [(each.ref, each.weight, each.kind) for each in taken.parents] == [
        ("chat:v1", 0.25, "imported"), ("translate:v1", 1.0, "imported"),
    ]  # fmt: skip


def test_a_recipe_that_is_none_is_refused_before_anything_is_registered(copied, new_home):
    for recipe in ("[]", '{"v": 1}', '{"method": "cat", "method": "svd"}', '{"a":' * 5000):
        rewrite(copied / "omni" / "v1" / WEIGHTS, {"adapterctl.recipe": recipe})
        with pytest.raises(InvalidAdapter, match="omni/v1"):
            list(take_in(new_home, read_family(copied)))

    assert new_home.ledger.versions() == []


def header(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def rewrite(path: Path, metadata: dict[str, str]) -> None:
    """Change the free-form part of a header and nothing else."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    entries["__metadata__"] |= metadata
    path.chmod(0o644)
    path.write_bytes(header_bytes(json.dumps(entries).encode()) + content[end:])
