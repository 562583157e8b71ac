"""Kill -9 at every named point of a merge, then ask for it again: one version, one run, exact edges, no partial file.
A resize takes the same way from its job on, and is killed at one point of each stretch of it.

All points share one home, so what one kill leaves behind would be in the way of the next.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from registries import nobody_works

from adapterctl.registry.crashpoints import CRASH_POINTS
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import MergeRequest, ResizeRequest
from adapterctl.registry.domain.refs import ParentRef, Ref
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.staging import sweep
from adapterctl.registry.wire import to_json

OF_A_MERGE = [point for point in CRASH_POINTS if not point.startswith(("eval.", "stage.", "tune."))]
IN_THE_CHILD = ("child.started", "child.module", "child.written")  # these leave the supervisor alive
PATIENCE_S = 120.0
#: What is asked for, and the parents and weights that the version then has.
REQUESTS = {
    "merge": (
        lambda into: MergeRequest((ParentRef(Ref("translate")), ParentRef(Ref("chat"), 0.5)), into=into),
        [("translate:v1", 1.0), ("chat:v1", 0.5)],
    ),
    "resize": (lambda into: ResizeRequest(Ref("translate"), into=into, energy=0.5), [("translate:v1", 1.0)]),
}
KILLS = [
    *(("merge", point) for point in OF_A_MERGE),
    *(("resize", point) for point in ("child.module", "register.files", "ledger.writing")),
]
SUBMIT = """
import sys
from adapterctl.bootstrap import connect
from adapterctl.registry.domain.recipe import MergeRequest, ResizeRequest
from adapterctl.registry.wire import from_json

kind = {"merge": MergeRequest, "resize": ResizeRequest}[sys.argv[1]]
getattr(connect(), sys.argv[1])(from_json(sys.argv[2], kind))
"""


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"nothing happened in {PATIENCE_S:g} s"
        time.sleep(0.05)


@pytest.mark.parametrize(("verb", "point"), KILLS)
def test_a_kill_at_any_point_leaves_one_version_once_it_is_asked_for_again(
    two_parents: LocalRegistry, tmp_path: Path, verb: str, point: str
):
    into, (asked_for, parents) = f"{verb}-{point.replace('.', '-')}", REQUESTS[verb]
    request = asked_for(into)
    died = tmp_path / "died"
    environment = os.environ | two_parents.settings.to_env()
    crash = {"ADAPTERCTL_CRASH_AT": point, "ADAPTERCTL_CRASH_ONCE": str(died)}

    wait_until(lambda: nobody_works(two_parents.settings.home))  # whoever is there would do it, and not die
    submit = [sys.executable, "-c", SUBMIT, verb, to_json(request)]
    subprocess.run(submit, env=environment | crash, check=False, timeout=PATIENCE_S)
    wait_until(died.exists)
    if point not in IN_THE_CHILD:  # who asks while the dying still hold their lock waits until they are missed
        wait_until(lambda: nobody_works(two_parents.settings.home))
    asked = getattr(two_parents, verb)(request)
    if asked.job is not None:
        *_, ended = two_parents.follow(asked.job.id, timeout_s=PATIENCE_S)
        assert ended.state is JobState.SUCCEEDED, ended.error

    [version] = two_parents.versions(into)
    assert [(parent.ref, parent.weight) for parent in version.parents] == parents
    client = MlflowClient(two_parents.ledger.mlflow_uri, two_parents.ledger.mlflow_uri)
    [model_version] = client.search_model_versions(f"name = '{into}'")
    assert int(model_version.version) == version.number
    experiment = client.get_run(version.run_id).info.experiment_id
    runs = client.search_runs([experiment], f"attributes.run_name LIKE 'merge {into}%'")
    assert [(run.info.run_id, run.info.status) for run in runs] == [(version.run_id, "FINISHED")]
    models = [model for model in client.search_logged_models([experiment]) if model.name == into]
    assert [(model.model_id, model.status.value) for model in models] == [(version.model_id, "READY")]
    assert two_parents.verify(Ref(into), rerun=False).files == "intact"


def test_nothing_but_versions_is_left_behind(two_parents: LocalRegistry):
    stages = two_parents.settings.home / "staging"
    wait_until(lambda: nobody_works(two_parents.settings.home))  # who has told of its end may still clean up

    sweep(stages)

    assert list(stages.iterdir()) == []
    stored = list((two_parents.settings.home / "artifacts").rglob("adapter_model.safetensors"))
    assert len(stored) == len(two_parents.versions())
