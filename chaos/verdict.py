"""The judge: what the ledger, MLflow and the disk hold after a run, against the model of what was asked for.

It looks when all is quiet, and it repairs nothing. A job that ended as failed is a loss, unless it was tried again and
succeeded; so is a merge that was accepted and has no version. Whatever is there twice is doubled, whoever is to blame.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from listener import read_heard
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.entities import PagedList
from model import SAME_FILES, Model
from sqlalchemy import text

from adapterctl.registry.domain.digest import file_digest
from adapterctl.registry.domain.job import Job, JobState
from adapterctl.registry.domain.version import AdapterVersion, local_folder
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.staging import sweep
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.mlflow_server import client_uri, embedded_uri
from adapterctl.registry.stores.sql.engine import Database

#: The kinds of findings; the columns of the table.
LOST, VERSIONS, RUNS, EDGES, BYTES, LEFT, EVENTS = (
    "lost", "doubled versions", "doubled runs", "wrong edges", "wrong bytes", "left behind", "wrong events",
)  # fmt: skip
KINDS = (LOST, VERSIONS, RUNS, EDGES, BYTES, LEFT, EVENTS)
KEY = "adapterctl.key"
FOREVER = 1_000_000


@dataclass
class Verdict:
    """What was found, by kind; nothing of it where all is well."""

    jobs: int = 0
    attempts: int = 0
    versions: int = 0
    findings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, message: str) -> None:
        self.findings.setdefault(kind, []).append(message)

    def count(self, kind: str) -> int:
        return len(self.findings.get(kind, ()))

    @property
    def clean(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class Accepted:
    """What a client was told about one merge."""

    number: int
    recipe: str
    job: str | None


def judge(
    registry: LocalRegistry,
    machines: Sequence[Settings],
    model: Model,
    accepted: Sequence[Accepted],
    heard: Sequence[Path] = (),
) -> Verdict:
    """Everything that can be said about the end of a run. `heard` is what each listener wrote down."""
    verdict = Verdict()
    made = _versions_by_wish(registry, model, accepted, verdict)
    _judge_jobs(registry, accepted, verdict)
    _judge_edges(registry, model, made, verdict)
    _judge_mlflow(registry, made, verdict)
    _judge_bytes(registry, model, made, verdict)
    _judge_rest(registry, machines, verdict)
    _judge_events(registry, heard, verdict)
    return verdict


def read_accepted(files: Sequence[Path], verdict: Verdict) -> list[Accepted]:
    """What the clients wrote down; a refusal is a finding, for everything that is asked for is possible."""
    found = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            if not line.endswith("}"):
                continue
            answer = json.loads(line)
            if "refused" in answer:
                verdict.add(LOST, f"merge {answer['number']} was refused: {answer['refused']}")
            else:
                found.append(Accepted(answer["number"], answer["recipe"], answer["job"]))
    return found


def _versions_by_wish(
    registry: LocalRegistry, model: Model, accepted: Sequence[Accepted], verdict: Verdict
) -> dict[int, AdapterVersion]:
    """The one version of each merge."""
    recipes = {each.number: each.recipe for each in accepted}
    versions = [version for version in registry.ledger.versions() if version.spec.kind == "merge"]
    verdict.versions = len(versions)
    made = {}
    for wanted in model.wanted:
        recipe = recipes.get(wanted.number)
        if recipe is None:
            verdict.add(LOST, f"merge {wanted.number} was never accepted")
            continue
        same = [v for v in versions if (v.name, v.spec.recipe_digest) == (wanted.into, recipe)]
        if not same:
            verdict.add(LOST, f"merge {wanted.number} has no version")
        elif len(same) > 1:
            verdict.add(VERSIONS, f"merge {wanted.number} is {[v.label for v in same]} in the ledger")
        if same:
            made[wanted.number] = same[0]
    strangers = {v.id for v in versions} - {v.id for v in made.values()}
    if strangers and len(versions) > len(made):
        verdict.add(VERSIONS, f"{len(strangers)} versions in the ledger that nobody asked for")
    return made


def _judge_jobs(registry: LocalRegistry, accepted: Sequence[Accepted], verdict: Verdict) -> None:
    jobs = {job.id: job for job in registry.ledger.jobs(limit=FOREVER)}
    verdict.jobs, verdict.attempts = len(jobs), sum(job.attempt for job in jobs.values())
    for each in accepted:
        if each.job is not None and each.job not in jobs:
            verdict.add(LOST, f"job {each.job} of merge {each.number} is gone")
    for job in jobs.values():
        _judge_job(registry, job, verdict)


def _judge_job(registry: LocalRegistry, job: Job, verdict: Verdict) -> None:
    if job.state is not JobState.SUCCEEDED:
        verdict.add(LOST, f"job {job.id} is {job.state} after {job.attempt} attempts: {job.error}")
        return
    kinds = [event.kind for event in registry.ledger.events(job.id)]
    if kinds.count("succeeded") != 1 or kinds[-1] not in ("succeeded", "cancel"):
        verdict.add(LOST, f"job {job.id} has the history {kinds}")
    if kinds.count("running") != job.attempt:
        verdict.add(LOST, f"job {job.id} was claimed {kinds.count('running')} times in {job.attempt} attempts")


def _judge_edges(registry: LocalRegistry, model: Model, made: dict[int, AdapterVersion], verdict: Verdict) -> None:
    edges = registry.ledger.parent_edges([version.id for version in made.values()])
    parents = registry.ledger.versions_by_id([e.parent_id for group in edges.values() for e in group])
    for number, version in made.items():
        found = [
            (parents[edge.parent_id].label, edge.weight, edge.position, edge.kind, edge.recipe_digest)
            for edge in edges.get(version.id, ())
        ]
        recipe = version.spec.recipe_digest
        expected = [
            (model.label(name), weight, position, "merge", recipe)
            for position, (name, weight) in enumerate(model.wanted[number].parents)
        ]
        if found != expected:
            verdict.add(EDGES, f"{version.label} has {found}, not {expected}")


def _judge_mlflow(registry: LocalRegistry, made: dict[int, AdapterVersion], verdict: Verdict) -> None:
    """One model version, one finished run and one ready model for each version of the ledger, and nothing else."""
    uri = client_uri(registry.settings.mlflow_uri or embedded_uri(registry.settings.home))
    client = MlflowClient(uri, uri)
    ours = {version.id: version for version in registry.ledger.versions()}
    stored = list(_pages(lambda token: client.search_model_versions(max_results=1000, page_token=token)))
    for version_key, count in Counter((each.name, each.tags[KEY]) for each in stored).items():
        if count > 1:
            verdict.add(VERSIONS, f"MLflow has {count} versions of {version_key[0]} with the key {version_key[1]}")
    for each in stored:
        version = ours.get(each.tags["adapterctl.version_id"])
        if version is None or (version.name, version.number) != (each.name, int(each.version)):
            verdict.add(VERSIONS, f"MLflow has {each.name}:v{each.version}, which the ledger does not know")
    if len(stored) < len(ours):
        verdict.add(LOST, f"MLflow has {len(stored)} of {len(ours)} versions")
    experiment = client.get_experiment_by_name("adapters").experiment_id
    runs = list(_pages(lambda token: client.search_runs([experiment], max_results=1000, page_token=token)))
    by_run = {version.placement.run_id: version for version in ours.values()}
    for run_key, count in Counter(run.data.tags[KEY] for run in runs).items():
        if count > 1:
            verdict.add(RUNS, f"MLflow has {count} runs with the key {run_key}")
    for run in runs:
        if run.info.run_id not in by_run:
            verdict.add(RUNS, f"run {run.info.run_name} ({run.info.status}) belongs to no version")
        elif run.info.status != "FINISHED":
            verdict.add(RUNS, f"run {run.info.run_name} is {run.info.status}")
    _judge_models(client, experiment, by_run, verdict)
    for number, version in made.items():
        _judge_links(registry, client.get_run(version.placement.run_id), version, number, verdict)


def _judge_models(client: MlflowClient, experiment: str, by_run: dict[str, AdapterVersion], verdict: Verdict) -> None:
    models = list(_pages(lambda token: client.search_logged_models([experiment], max_results=50, page_token=token)))
    known = {version.placement.model_id for version in by_run.values()}
    for model in models:
        if model.model_id not in known:
            verdict.add(RUNS, f"the model {model.name} of run {model.source_run_id} belongs to no version")
        elif model.status.value != "READY":
            verdict.add(RUNS, f"the model {model.name} is {model.status.value}")


def _judge_links(registry: LocalRegistry, run: Run, version: AdapterVersion, number: int, verdict: Verdict) -> None:
    """What MLflow's pages show of the parents."""
    edges = registry.ledger.parent_edges([version.id]).get(version.id, ())
    parents = registry.ledger.versions_by_id([edge.parent_id for edge in edges])
    expected = sorted({parents[edge.parent_id].placement.model_id for edge in edges})
    found = sorted(each.model_id for each in run.inputs.model_inputs)
    outputs = [each.model_id for each in run.outputs.model_outputs]
    if found != expected or outputs != [version.placement.model_id]:
        verdict.add(EDGES, f"the run of {version.label} (merge {number}) has inputs {found} and outputs {outputs}")


def _judge_bytes(registry: LocalRegistry, model: Model, made: dict[int, AdapterVersion], verdict: Verdict) -> None:
    for version in registry.ledger.versions():
        folder = local_folder(version.placement.location)
        assert folder is not None
        for file in version.placement.files:
            path = folder / file.path
            if not path.is_file() or file_digest(path) != file.sha256:
                verdict.add(BYTES, f"{file.path} of {version.label} is not what its manifest says")
    for number, version in made.items():
        found = {file.path: file.sha256 for file in version.placement.files}
        for name in SAME_FILES:
            if found.get(name) != model.digests[number][name]:
                verdict.add(BYTES, f"{name} of {version.label} (merge {number}) is not that of an undisturbed merge")


def _judge_rest(registry: LocalRegistry, machines: Sequence[Settings], verdict: Verdict) -> None:
    """Nothing lies about, nothing is held."""
    for home in (machine.home for machine in machines):
        if (home / "staging").exists():
            sweep(home / "staging")  # what whoever stages next does first
            for path in (home / "staging").iterdir():
                verdict.add(LEFT, f"{path} is still there")
        for path in (home / "jobs").glob("*"):
            if path.suffix != ".log":
                verdict.add(LEFT, f"{path} is still there")
        for path in (home / "locks").glob("*.lock"):
            with path.open("a") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    verdict.add(LEFT, f"{path} is still held")
    _judge_folders([version.placement.location for version in registry.ledger.versions()], verdict)
    if registry.settings.database_url:
        database = Database(registry.settings.database_url)
        with database.read() as connection:
            held = connection.execute(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")).scalar_one()
        database.close()
        if held:
            verdict.add(LEFT, f"{held} advisory locks are still held")


def _judge_folders(locations: Sequence[str], verdict: Verdict) -> None:
    """In the folder that holds the files of every version there is nothing else."""
    known = {local_folder(location) for location in locations}
    for root in {folder.parents[1] for folder in known if folder is not None}:
        for path in sorted(root.rglob("adapter_model.safetensors")):
            if path.parent not in known:
                verdict.add(LEFT, f"{path} belongs to no version")


def _judge_events(registry: LocalRegistry, heard: Sequence[Path], verdict: Verdict) -> None:
    """One event for each version, counted without holes; and who listened heard exactly these, in their order."""
    events, last = registry.ledger.feed(0, limit=FOREVER)
    told = [(event.id, event.kind, event.ref) for event in events]
    if [number for number, _, _ in told] != list(range(1, last + 1)):
        verdict.add(EVENTS, f"of {last} events there are {[number for number, _, _ in told]}")
    versions = registry.ledger.versions()
    made = Counter(("merge" if each.spec.kind == "merge" else "register", each.label) for each in versions)
    if (found := Counter((kind, ref) for _, kind, ref in told)) != made:
        verdict.add(EVENTS, f"the events tell of {found - made} too often, and too rarely of {made - found}")
    for path in heard:
        if (written := read_heard(path)) != told:
            missed = [event for event in told if event not in written]
            verdict.add(EVENTS, f"{path.stem} has {len(written)} of {len(told)} events, without {missed[:3]}")


def _pages(ask: Any) -> Iterator[Any]:
    token = None
    while True:
        page: PagedList[Any] = ask(token)
        yield from page
        token = page.token
        if not token:
            return
