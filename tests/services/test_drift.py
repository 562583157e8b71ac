"""What people do in MLflow behind our back, on the real one: every deed is seen by `doctor`, with the way out."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.errors import Misconfigured
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings


def told(registry: LocalRegistry) -> list[tuple[str, str]]:
    names = {"deleted", "renamed", "replaced", "unknown", "strangers", "stage"}
    checks = [check for check in registry.doctor() if check.name in names]
    assert all(check.hint for check in checks)
    return [(check.name, check.detail) for check in checks]


@pytest.fixture
def client(two_parents: LocalRegistry):
    return two_parents.version_store._client


def test_a_copied_home_does_not_write_into_the_first_ones_mlflow(two_parents: LocalRegistry, tmp_path: Path):
    home = two_parents.settings.home
    copied, named = tmp_path / "copied", tmp_path / "named"
    shutil.copytree(home, copied)
    named.symlink_to(home)
    before = (home / "mlflow.db").read_bytes()

    with pytest.raises(Misconfigured, match=f"{copied} is a copy of the registry in {home}"):
        connect(Settings(home=copied))
    reader = connect(Settings(home=copied), readonly=True)
    with closing(reader.ledger):
        (told,) = [check for check in reader.doctor() if check.name == "mlflow"]
        abroad = reader.doctor(abroad=True)
    connect(Settings(home=named)).ledger.close()  # the same folder by another name

    assert (told.status, told.hint.split(";")[0]) == ("error", f"use --home {home}")
    assert "is a copy" in str(abroad)
    assert not [check for check in abroad for place in (home, copied) if str(place) in f"{check.detail} {check.hint}"]
    assert (home / "mlflow.db").read_bytes() == before


def test_a_moved_home_says_where_it_was_and_makes_nothing_there(two_parents: LocalRegistry, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    shutil.copy(two_parents.settings.home / "mlflow.db", first)
    connect(Settings(home=first)).ledger.close()
    first.rename(second)

    with pytest.raises(Misconfigured, match=f"was made in {first}") as refused:
        connect(Settings(home=second))

    assert refused.value.hint.endswith(f"ln -s {second} {first}")
    assert not first.exists()


def test_a_home_that_is_copied_or_moved_before_its_first_version_makes_nothing_in_the_first_one(tmp_path: Path):
    first, second, moved = tmp_path / "first", tmp_path / "second", tmp_path / "moved"
    connect(Settings(home=first)).ledger.close()
    shutil.copytree(first, second)

    with pytest.raises(Misconfigured, match=f"{second} is a copy of the registry in {first}"):
        connect(Settings(home=second))
    connect(Settings(home=first)).ledger.close()
    first.rename(moved)
    with pytest.raises(Misconfigured, match=f"the registry in {moved} was made in {first}"):
        connect(Settings(home=moved))
    first.symlink_to(moved)
    connect(Settings(home=moved)).ledger.close()


def test_a_home_whose_mlflow_was_asked_for_elsewhere_needs_none_of_its_own(tmp_path: Path):
    asked = Settings(home=tmp_path / "home", mlflow_uri=f"sqlite:///{tmp_path}/to be made/mlflow.db")
    for _ in range(2):
        connect(asked).ledger.close()
    (tmp_path / "to be made").mkdir()

    connect(Settings(home=tmp_path / "home")).ledger.close()


def test_every_deed_behind_our_back_is_seen(two_parents: LocalRegistry, client):
    assert told(two_parents) == []

    client.create_registered_model("resnet")
    client.create_model_version("chat", source="models:/chat/1")
    client.set_registered_model_alias("chat", "production", "1")
    client.rename_registered_model("translate", "translator")

    assert sorted(told(two_parents)) == [
        ("renamed", "the registered model translate is called translator in MLflow"),
        ("stage", "chat@production is nothing here, MLflow's alias points to v1"),
        ("strangers", "registered models that are not ours: resnet"),
        ("unknown", "MLflow has chat version 2, which the ledger does not know"),
    ]

    two_parents.adopt("chat", stage="production", reason="moved by hand")
    assert [event.action for event in two_parents.history("chat").events] == ["adopt"]
    client.rename_registered_model("translator", "translate")
    client.delete_registered_model("resnet")
    client.delete_model_version("chat", "2")
    assert told(two_parents) == []

    two_parents.demote("chat", stage="production")
    client.delete_model_version("chat", "1")
    assert told(two_parents) == [("deleted", "chat:v1 is gone from MLflow")]
    client.delete_registered_model("translate")
    assert ("deleted", "the registered model translate is gone from MLflow, 1 versions are in the ledger") in told(
        two_parents
    )
    two_parents.remove(parse_ref("translate:v1"), reason="gone anyway")
    assert told(two_parents) == [("deleted", "chat:v1 is gone from MLflow")]


def test_a_database_of_another_registry_is_told_before_anything_is_registered(two_parents: LocalRegistry, home: Path):
    """As where the ledger was lost and MLflow was not."""
    shutil.copy(two_parents.settings.home / "mlflow.db", home / "mlflow.db")

    registry = connect(Settings(home=home, actor="ada"))
    with closing(registry.ledger):
        found = [check for check in registry.doctor() if check.name == "mlflow"]

    assert [check.status for check in found] == ["error"]
    assert "belongs to registry" in found[0].detail
