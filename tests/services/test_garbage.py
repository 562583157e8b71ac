"""gc over the real ledger and the real MLflow: what a kill left is named, then freed, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from registries import nobody_works

from adapterctl.registry.api import GarbageView
from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.services import garbage
from adapterctl.registry.services.doubles import clear_doubles
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.staging import stage_folder

PATIENCE_S = 60.0
MERGE = """
from adapterctl.bootstrap import connect
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import ParentRef, Ref

connect().merge(MergeRequest((ParentRef(Ref("translate")), ParentRef(Ref("chat"))), into="both"))
"""
REGISTER = """
import sys
from adapterctl.bootstrap import connect

connect().register(sys.argv[1], name="late")
"""

DIE_WITH_LOCK = """
import os, signal
from adapterctl.bootstrap import connect

with connect().ledger.exclusive("merge:one"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(two_parents: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> LocalRegistry:
    """A registry whose one merge was killed when its LoggedModel was there, and its files were not."""
    died = tmp_path_factory.mktemp("crash") / "died"
    crash = {"ADAPTERCTL_CRASH_AT": "register.model", "ADAPTERCTL_CRASH_ONCE": str(died)}
    environment = os.environ | two_parents.settings.to_env() | crash
    subprocess.run([sys.executable, "-c", MERGE], env=environment, check=True, timeout=PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while not (died.exists() and nobody_works(two_parents.settings.home)):
        assert time.monotonic() < deadline, "the merge was not killed"
        time.sleep(0.05)
    return two_parents


def files(home: Path) -> dict[str, bytes]:
    """All that lies in a home but the databases, whose bytes change when they are read."""
    found = (path for path in home.rglob("*") if path.is_file() and ".db" not in path.name)
    return {str(path): path.read_bytes() for path in found}


def kinds(view: GarbageView) -> list[str]:
    return [each.kind for each in view.found]


def mlflow(registry: LocalRegistry) -> MlflowClient:
    return MlflowClient(registry.ledger.mlflow_uri, registry.ledger.mlflow_uri)


def models(registry: LocalRegistry) -> set[str]:
    experiment = mlflow(registry).get_experiment_by_name("adapters").experiment_id
    return {model.model_id for model in mlflow(registry).search_logged_models([experiment])}


def test_what_a_killed_merge_left_is_freed_once_no_job_goes_on_with_it(killed: LocalRegistry):
    home, ledger = killed.settings.home, killed.ledger
    live = {version.model_id: version for version in killed.versions()}
    (job,) = killed.jobs(kind="merge")
    (orphan,) = models(killed) - live.keys()
    run = mlflow(killed).get_logged_model(orphan).source_run_id

    while_it_runs = killed.gc(older_than_s=0.0, dry_run=True)
    ledger.reap(abandoned=True)
    while_it_waits = killed.gc(older_than_s=0.0, dry_run=True)
    killed.cancel(job.id)
    assert killed.job(job.id).state is JobState.CANCELLED

    young = killed.gc(dry_run=True)
    before = files(home)
    told = killed.gc(older_than_s=0.0, dry_run=True)
    assert files(home) == before
    assert orphan in models(killed)
    with stage_folder(home) as mine, ledger.exclusive(f"merge:{job.key}"):
        (mine / "half").write_bytes(b"written")
        while_locked = killed.gc(older_than_s=0.0, dry_run=True)
        assert [each.name for each in while_locked.found if each.kind == "stage"] == []
    freed = killed.gc(older_than_s=0.0)
    again = killed.gc(older_than_s=0.0)

    # the stage folder of the dead is nobody's, whatever becomes of the job
    assert (kinds(while_it_runs), kinds(while_it_waits), kinds(young)) == (["stage"],) * 3
    assert kinds(told) == ["attempt", "stage", "log"]
    assert told.found[0].name == f"run {run}"
    assert told.found[1].size_bytes > 0
    assert told.size_bytes == sum(each.size_bytes for each in told.found)
    assert kinds(while_locked) == ["log"]  # whoever stages next clears up itself
    assert freed.found == (told.found[0], told.found[2])
    assert again.found == ()
    assert models(killed) == set(live)
    assert mlflow(killed).get_run(run).info.lifecycle_stage == "deleted"
    assert not list((home / "artifacts").rglob(orphan))
    assert not (home / "jobs" / f"{job.id}.log").exists()
    for version in live.values():
        assert killed.verify(Ref(version.name, number=version.number)).files == "intact"


def test_files_that_a_removal_left_are_freed_and_other_tombstones_stay_as_they_are(
    two_parents: LocalRegistry, tiny_adapter, tmp_path: Path
):
    registry = two_parents
    for seed in (50, 51):
        registry.register(str(tiny_adapter(tmp_path / str(seed), seed=seed)), name="gone")
    _, cut_short = registry.versions("gone")
    registry.remove(Ref("gone", number=1), reason="test")
    registry.ledger.remove_version(cut_short.id, actor="ada", reason="then the process died")
    place = Path(registry.ledger.version(cut_short.id).placement.location.removeprefix("file://"))
    assert place.is_dir()

    told, freed, again = (registry.gc(dry_run=dry_run) for dry_run in (True, False, False))

    assert [(each.kind, each.name) for each in told.found] == [("version", "gone:v2")]
    assert told.size_bytes == cut_short.size_bytes > 0
    assert freed.found == told.found
    assert again.found == ()
    assert not place.parent.exists()
    assert registry.verify(Ref("translate")).files == "intact"


def test_what_mlflow_has_a_version_for_is_left_to_doctor(two_parents: LocalRegistry, tiny_adapter, tmp_path: Path):
    """As after an older ledger was restored: it knows less than MLflow."""
    source = tiny_adapter(tmp_path / "late", seed=60)
    crash = {"ADAPTERCTL_CRASH_AT": "register.version"}
    environment = os.environ | two_parents.settings.to_env() | crash
    subprocess.run([sys.executable, "-c", REGISTER, str(source)], env=environment, check=False, timeout=PATIENCE_S)

    freed = two_parents.gc(older_than_s=0.0)

    assert [each for each in freed.found if each.kind == "attempt"] == []
    assert two_parents.register(str(source), name="late").created
    assert two_parents.verify(Ref("late")).files == "intact"


def test_what_was_made_twice_is_named_by_doctor_and_freed(two_parents: LocalRegistry):
    """As after two processes registered one version at once, and the one that the ledger refused was killed then."""
    version = two_parents.ledger.version_by_number("chat", 1)
    assert version is not None
    client, store = mlflow(two_parents), two_parents.version_store
    run = client.get_run(version.placement.run_id)
    experiment, tags = run.info.experiment_id, {k: v for k, v in run.data.tags.items() if k.startswith("adapterctl.")}
    other_run = client.create_run(experiment, tags={**tags, "adapterctl.version_id": "of-the-killed"}).info.run_id
    client.set_terminated(other_run)
    made = [
        client.create_logged_model(experiment, source_run_id=each) for each in (version.placement.run_id, other_run)
    ]
    for model in made:
        client.finalize_logged_model(model.model_id, "READY")
        with store._mlflow.as_global_uri():
            client.create_model_version(
                "chat", f"models:/{model.model_id}", model.source_run_id, tags=tags, model_id=model.model_id
            )
            client.copy_model_version("models:/chat/1", "copied")  # a person's copy carries every tag

    named = [check.detail for check in two_parents.doctor() if check.name in ("doubled", "unknown")]
    told, freed, again = (two_parents.gc(dry_run=dry_run) for dry_run in (True, False, False))

    doubles = ["chat version 2", "chat version 3", f"model {made[0].model_id}", f"run {other_run}"]
    beside = "beside chat:v1: it was made twice, and the ledger names the other"
    assert named == [f"MLflow has {each} {beside}" for each in doubles]
    assert [(each.kind, each.name) for each in told.found] == [("double", each) for each in doubles]
    assert freed.found == told.found
    assert again.found == ()
    assert [each.version for each in client.search_model_versions("name = 'chat'")] == [1]
    assert client.search_model_versions("name = 'copied'")
    assert models(two_parents).isdisjoint({model.model_id for model in made})
    assert client.get_run(other_run).info.lifecycle_stage == "deleted"
    assert client.get_run(version.placement.run_id).info.lifecycle_stage == "active"
    assert two_parents.verify(Ref("chat")).files == "intact"


def test_a_version_with_the_key_of_another_is_no_double(two_parents: LocalRegistry):
    """A tag is changed with one click in MLflow; what the ledger names stays, whoever cleans up."""
    chat, other = (two_parents.ledger.version_by_number(name, 1) for name in ("chat", "translate"))
    assert chat is not None
    assert other is not None
    client = mlflow(two_parents)
    key = client.get_run(chat.placement.run_id).data.tags["adapterctl.key"]
    own = client.get_run(other.placement.run_id).data.tags["adapterctl.key"]
    client.set_tag(other.placement.run_id, "adapterctl.key", key)
    client.set_model_version_tag(other.name, "1", "adapterctl.key", key)

    clear_doubles(two_parents.ledger, two_parents.version_store, key, lambda: chat)
    freed = two_parents.gc(dry_run=False)

    assert [check for check in two_parents.doctor() if check.name == "doubled"] == []
    assert [each for each in freed.found if each.kind == "double"] == []
    assert [two_parents.verify(Ref(name)).files for name in ("chat", "translate")] == ["intact", "intact"]
    client.set_tag(other.placement.run_id, "adapterctl.key", own)
    client.set_model_version_tag(other.name, "1", "adapterctl.key", own)


def test_the_lock_files_of_the_killed_go_and_held_ones_stay(two_parents: LocalRegistry):
    ledger, folder = two_parents.ledger, two_parents.settings.home / "locks"
    two_parents.gc(older_than_s=0.0)
    environment = os.environ | two_parents.settings.to_env()
    subprocess.run([sys.executable, "-c", DIE_WITH_LOCK], env=environment, check=False, timeout=PATIENCE_S)
    left = {path for path in folder.iterdir() if path.name != "supervisor.lock"}

    with ledger.exclusive("mine"):
        told, freed, again = (two_parents.gc(dry_run=dry_run) for dry_run in (True, False, False))
        held = {path for path in folder.iterdir() if path.name != "supervisor.lock"}

    assert len(left) == 1
    assert [(each.kind, each.name) for each in told.found] == [("lock", str(*left))]
    assert (freed.found, again.found) == (told.found, ())
    assert len(held) == 1
    assert held.isdisjoint(left)


def test_what_the_ledger_keeps_of_a_log_goes_a_month_later(two_parents: LocalRegistry, monkeypatch: pytest.MonkeyPatch):
    ledger, ids = two_parents.ledger, []
    for key in ("ended", "running"):
        ledger.submit(NewJob("tune", key, key, {}, "ada"))
        job = ledger.claim("me", 60.0, kinds=["tune"])
        assert job is not None
        ledger.append_log(job.id, "one\n")
        ledger.append_log(job.id, "two\n")
        ids.append(job.id)
    ledger.finish(ids[0], 1, JobState.FAILED)

    young = two_parents.gc(older_than_s=0.0)
    monkeypatch.setattr(garbage, "LOGS_KEPT_S", 0.0)
    told, freed, again = (two_parents.gc(older_than_s=0.0, dry_run=dry_run) for dry_run in (True, False, False))

    assert [each.name for each in young.found if "in the ledger" in each.name] == []
    mine = [(each.kind, each.size_bytes) for each in told.found if ids[0] in each.name]
    assert mine == [("log", 8)]
    assert freed.found == told.found
    assert again.found == ()
    assert ledger.log(ids[0]) == []
    assert [piece.text for piece in ledger.log(ids[1])] == ["one\n", "two\n"]
    assert [event.kind for event in ledger.events(ids[0])][-1] == "failed"


def test_logs_and_work_go_by_what_became_of_their_job(two_parents: LocalRegistry):
    ledger, folder = two_parents.ledger, two_parents.settings.home / "jobs"
    folder.mkdir(exist_ok=True)
    jobs = {}
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.RUNNING):
        ledger.submit(NewJob("eval", state, f"job {state}", {}, "ada"))
        job = ledger.claim("me", 60.0, kinds=["eval"])
        assert job is not None
        if state is not JobState.RUNNING:
            assert ledger.finish(job.id, job.attempt, state)
        jobs[state] = job.id
    names = [f"{job_id}{ending}" for job_id in jobs.values() for ending in (".log", ".trials.jsonl")]
    for name in ("stranger.log", "supervisor.log", *names):
        (folder / name).write_text("text\n")

    freed = two_parents.gc(older_than_s=0.0)

    succeeded, failed = jobs[JobState.SUCCEEDED], jobs[JobState.FAILED]
    gone = {f"{succeeded}.log": "log", f"{succeeded}.trials.jsonl": "work", f"{failed}.log": "log"}
    assert {Path(each.name).name: each.kind for each in freed.found if each.kind in ("log", "work")} == gone
    kept = {"stranger.log", "supervisor.log", *names} - gone.keys()
    assert kept <= {path.name for path in folder.iterdir()}
    assert gone.keys().isdisjoint(path.name for path in folder.iterdir())
    with pytest.raises(InvalidInput, match="older_than_s"):
        two_parents.gc(older_than_s=-1.0)
