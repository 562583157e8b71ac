"""MLflow's stock server: on a registry of ours, without us, and as the MLflow of a registry."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from adapterctl.registry.domain.errors import Misconfigured
from adapterctl.registry.domain.version import local_folder
from adapterctl.registry.ports import Parent
from adapterctl.registry.services.pull import damage
from adapterctl.registry.stores.mlflow_server import ENVIRONMENT, SWITCHED_OFF, artifact_root, embedded_uri
from adapterctl.registry.stores.mlflow_versions import MlflowVersions


@pytest.fixture
def serve(mlflow_home: Path, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Start `mlflow server` on the registry in `home`; returns its address."""
    with ExitStack() as running:
        yield lambda: running.enter_context(serving(mlflow_home, tmp_path))


@contextmanager
def serving(home: Path, cwd: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-P", "-m", "mlflow", "server", "--backend-store-uri", embedded_uri(home)),
        *("--artifacts-destination", artifact_root(home), "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", f"localhost:{port},127.0.0.1:{port}"),
    ]
    environment = {**ENVIRONMENT, **SWITCHED_OFF}
    log = cwd / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, env=os.environ | environment, cwd=cwd, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        try:
            urlopen(url, timeout=5).close()
            return
        except (URLError, OSError):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def get(url: str, **headers: str) -> bytes:
    with urlopen(Request(url, headers=headers), timeout=30) as answer:
        return answer.read()


def test_the_stock_pages_show_an_embedded_registry_to_this_machine_only(serve, family, tmp_path):
    model_id = family["translate-chat"].placement.model_id
    address = serve()

    page = get(address + "/")
    version = json.loads(get(f"{address}/api/2.0/mlflow/model-versions/get?name=translate-chat&version=1"))
    files = json.loads(get(f"{address}/api/2.0/mlflow/logged-models/{model_id}/artifacts/directories"))
    with pytest.raises(HTTPError) as refused:
        get(f"{address}/api/2.0/mlflow/experiments/search?max_results=1", Host="evil.example")

    assert b"<title>MLflow</title>" in page
    assert version["model_version"]["description"].startswith("cat merge of translate:v1 + chat:v1.")
    assert "adapter_model.safetensors" in {each["path"] for each in files["files"]}
    assert refused.value.code == 403
    assert not (tmp_path / "mlruns").exists()


# MLflow's HTTP client leaves connections to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_a_registry_may_keep_its_versions_in_an_mlflow_server(
    serve, spec_of, recorded, stage, tmp_path, monkeypatch, capfd
):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    store = MlflowVersions(serve(), tmp_path / "unused", "a-registry")
    store.check_identity()
    parent_spec = spec_of("parent", "p")
    child_spec = spec_of("child", "c", kind="merge", recipe={"method": "cat", "options": {}}, metrics={"bleu": 0.5})
    store.ensure_adapter("parent", "id-of-parent", parent_spec.base)
    store.ensure_adapter("child", "id-of-child", child_spec.base)
    _, at = store.place(parent_spec, adapter_id="id-of-parent", version_id="1", key="p", staged=stage("p"), parents=())
    parent = recorded(parent_spec, "1", at)
    child = {"adapter_id": "id-of-child", "key": "c", "parents": (Parent(parent, 1.0),)}

    _, placement = store.place(child_spec, version_id="2", staged=stage("c"), **child)
    again = store.place(child_spec, version_id="3", staged=stage("c"), **child)
    store.project_stage("child", "production", number=1, legacy={1: "Production"})

    assert again == ("2", placement)
    assert store.alias("child", "production") == 1
    assert local_folder(placement.location) is None
    with store.folder(parent) as folder:
        assert damage(folder, at.files) == []
    with store.source_folder("model", "child@production", [file.path for file in placement.files]) as folder:
        assert damage(folder, placement.files) == []
    store.remove(parent)
    assert store.alias("parent", "production") is None
    with pytest.raises(Misconfigured, match="belongs to registry a-registry"):
        MlflowVersions(store._mlflow.uri, tmp_path, "another-registry").check_identity()
    assert not (tmp_path / "unused").exists()
    assert capfd.readouterr().out == ""
