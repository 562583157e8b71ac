"""Files of versions on S3-compatible storage, through MLflow's own client, against a real server of that interface."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from tiny import write_tiny_adapter

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.errors import Corrupt, Unavailable
from adapterctl.registry.domain.job import JobState
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.pull import damage
from adapterctl.registry.settings import Settings

BUCKET, SECRET = "adapters", "s3-canary-77ab"
WEIGHTS = "adapter_model.safetensors"


class Store:
    """A server of the S3 interface on this machine; `cut` is the end of a key whose upload breaks off half way."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        self.url = "http://{}:{}".format(*server.get_host_and_port())
        self.cut = ""
        self._app, server._server.app = server._server.app, self

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.cut and environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(self.cut):
            environ["wsgi.input"].read(100)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return self._app(environ, start_response)

    def objects(self) -> list[str]:
        return [each["Key"] for each in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", ())]

    @property
    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield Store(server)
    server.stop()


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The server with one empty bucket, and this process told of it as an operator would."""
    for name, value in {
        "MLFLOW_S3_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "adapterctl",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    server.cut = ""
    server.client.create_bucket(Bucket=BUCKET)
    for key in server.objects():
        server.client.delete_object(Bucket=BUCKET, Key=key)
    return server


@pytest.fixture
def new_registry(
    home: Path, postgres_url: str, new_database: Callable[[str], str], postgres_mlflow_schema: str, store: Store
) -> Iterator[Callable[[str], LocalRegistry]]:
    """Make a shared registry whose files lie at an address."""
    opened = []

    def make(artifacts: str) -> LocalRegistry:
        mlflow_uri = new_database(postgres_mlflow_schema)
        settings = Settings(
            home=home, database_url=postgres_url, mlflow_uri=mlflow_uri, artifacts=artifacts, idle_s=0.2, actor="ada"
        )
        opened.append(connect(settings))
        return opened[-1]

    yield make
    for registry in opened:
        registry.ledger.close()


@pytest.fixture
def registry(new_registry: Callable[[str], LocalRegistry]) -> LocalRegistry:
    return new_registry(f"s3://{BUCKET}/team/adapters")


def test_versions_live_in_a_bucket_from_registration_to_removal(
    registry: LocalRegistry, store: Store, home: Path, tmp_path: Path
):
    for seed, name in enumerate(("translate", "chat"), start=1):
        registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
    request = MergeRequest((parse_parent("translate:v1"), parse_parent("chat:v1")), into="both", method="cat")

    *_, job = registry.follow(registry.merge(request).job.id, timeout_s=120)
    version = registry.version(parse_ref("both:v1"))
    pulled = registry.pull(parse_ref("both:v1"), tmp_path / "pulled")
    verified = registry.verify(parse_ref("both:v1"))

    assert (job.state, job.error) == (JobState.SUCCEEDED, None)
    assert pulled.ref == "both:v1"
    assert damage(tmp_path / "pulled", version.files) == []
    assert (verified.files, verified.recipe) == ("intact", "identical")
    assert all(key.startswith("team/adapters/") for key in store.objects())
    assert sum(key.endswith(WEIGHTS) for key in store.objects()) == 3
    assert not list(home.rglob(WEIGHTS))  # what was fetched to merge and to verify is gone again
    for path in (each for each in home.rglob("*") if each.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path

    registry.remove(parse_ref("both:v1"), reason="no longer needed")

    assert sum(key.endswith(WEIGHTS) for key in store.objects()) == 2


def test_an_object_that_was_damaged_or_lost_is_found(registry: LocalRegistry, store: Store, tmp_path: Path):
    registry.register(str(write_tiny_adapter(tmp_path / "chat")), name="chat")
    key = next(key for key in store.objects() if key.endswith(WEIGHTS))
    body = bytearray(store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[-1] ^= 1

    store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    damaged = registry.verify(parse_ref("chat:v1"))
    with pytest.raises(Corrupt, match="other content than the manifest says"):
        registry.pull(parse_ref("chat:v1"), tmp_path / "pulled")
    store.client.delete_object(Bucket=BUCKET, Key=key)
    lost = registry.verify(parse_ref("chat:v1"))
    for each in store.objects():
        store.client.delete_object(Bucket=BUCKET, Key=each)
    with pytest.raises(Corrupt, match="the files of chat:v1 are gone"):
        registry.verify(parse_ref("chat:v1"))

    assert damaged.details == (f"{WEIGHTS} has other content than the manifest says",)
    assert (lost.files, lost.details) == ("damaged", (f"{WEIGHTS} is missing",))
    assert not (tmp_path / "pulled").exists()


def test_an_upload_that_was_cut_short_registers_nothing_and_can_be_made_again(
    registry: LocalRegistry, store: Store, tmp_path: Path
):
    folder = str(write_tiny_adapter(tmp_path / "chat"))

    store.cut = WEIGHTS
    with pytest.raises(Unavailable, match="S3 refused") as caught:
        registry.register(folder, name="chat")
    after_the_cut = registry.versions()
    store.cut = ""
    done = registry.register(folder, name="chat")

    assert SECRET not in str(caught.value)
    assert after_the_cut == []
    assert done.version.ref == "chat:v1"
    assert registry.verify(parse_ref("chat:v1")).files == "intact"


def test_what_removals_and_uploads_that_were_cut_short_left_in_the_bucket_is_freed(
    registry: LocalRegistry, store: Store, tmp_path: Path
):
    for seed, name in enumerate(("kept", "gone"), start=1):
        registry.register(str(write_tiny_adapter(tmp_path / name, seed=seed)), name=name)
    kept = {key for key in store.objects() if registry.version(parse_ref("gone")).model_id not in key}
    registry.ledger.remove_version(registry.version(parse_ref("gone")).id, actor="ada", reason="then the process died")
    store.cut = "manifest.json"  # the weights are there by then
    with pytest.raises(Unavailable):
        registry.register(str(write_tiny_adapter(tmp_path / "cut", seed=3)), name="cut")
    store.cut = ""

    told, freed, again = (registry.gc(older_than_s=0.0, dry_run=dry_run) for dry_run in (True, False, False))

    assert [each.kind for each in told.found] == ["version", "attempt"]
    assert all(each.size_bytes > 0 for each in told.found)
    assert (freed.found, again.found) == (told.found, ())
    assert set(store.objects()) == kept
    assert registry.verify(parse_ref("kept")).files == "intact"


def test_a_bucket_that_is_not_there_is_said_in_our_words(new_registry: Callable[[str], LocalRegistry], tmp_path: Path):
    registry = new_registry("s3://nowhere/adapters")

    with pytest.raises(Unavailable, match="bucket does not exist"):
        registry.register(str(write_tiny_adapter(tmp_path / "chat")), name="chat")

    assert registry.versions() == []
