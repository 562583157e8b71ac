"""A process that is killed while it writes a version to MLflow, and the one that comes after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from adapterctl.registry.domain.version import local_folder
from adapterctl.registry.ports import Parent
from adapterctl.registry.services.pull import damage
from adapterctl.registry.wire import to_json

PLACE = """
import sys
from pathlib import Path
from adapterctl.registry.domain.version import NewVersion
from adapterctl.registry.ports import Parent
from adapterctl.registry.stores.mlflow_versions import MlflowVersions
from adapterctl.registry.wire import from_json

home, registry_id, spec, parents, staged = sys.argv[1:]
spec = from_json(spec, NewVersion)
store = MlflowVersions(None, Path(home), registry_id)
store.ensure_adapter(spec.adapter, "the-id", spec.base)
store.place(
    spec,
    adapter_id="the-id",
    version_id="first",
    key=f"key-of-{spec.adapter}",
    staged=Path(staged),
    parents=from_json(parents, tuple[Parent, ...]),
)
"""


@pytest.mark.parametrize("point", ["run", "model", "files", "finalized", "linked", "version"])
def test_what_a_killed_process_began_is_continued_to_one_run_one_model_and_one_version(point, shared, spec_of):
    shelf, family = shared
    name, key = f"crashed-{point}", f"key-of-crashed-{point}"
    parents = (Parent(family["translate"], 0.6), Parent(family["chat"], 0.4))
    spec = spec_of(name, "w", kind="merge", recipe={"method": "svd", "options": {}}, receipt={"loss": 0.1})
    values = [str(shelf.home), shelf.registry_id, to_json(spec), to_json(parents), str(shelf.stage("w"))]

    killed = subprocess.run(
        [sys.executable, "-c", PLACE, *values],
        env={**os.environ, "ADAPTERCTL_CRASH_AT": f"register.{point}"},
        check=False,
    )
    version_id, placement = shelf.store.place(
        spec, adapter_id="the-id", version_id="second", key=key, staged=shelf.stage("w"), parents=parents
    )

    assert killed.returncode == -signal.SIGKILL
    assert (version_id, placement.number) == ("first", 1)
    runs = shelf.runs(f"tags.`adapterctl.key` = '{key}'")
    assert [(run.info.run_id, run.info.status) for run in runs] == [(placement.run_id, "FINISHED")]
    assert len(runs[0].inputs.model_inputs) == 2
    assert [each.model_id for each in runs[0].outputs.model_outputs] == [placement.model_id]
    models = shelf.client.search_logged_models([runs[0].info.experiment_id], f"source_run_id = '{placement.run_id}'")
    assert [(model.model_id, model.status) for model in models] == [(placement.model_id, "READY")]
    assert {metric.key: metric.value for metric in models[0].metrics} == {"receipt/loss": 0.1}
    on_parent = shelf.client.get_logged_model(family["chat"].placement.model_id).metrics
    assert [metric.run_id for metric in on_parent].count(placement.run_id) == 1
    assert [each.version for each in shelf.client.search_model_versions(f"name = '{name}'")] == [1]
    assert damage(local_folder(placement.location), placement.files) == []
