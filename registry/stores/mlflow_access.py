"""One MLflow and the part of it that is ours: connection, identity, and the few questions that everything else asks.

MLflow is used through a client of our own, never through its fluent functions: those share one global state with the
caller's program and would, for instance, make a merged model an input of the caller's active run.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Literal, ParamSpec, TypeVar

from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..domain.errors import Corrupt, Misconfigured, NotAllowed, NotFound, Unavailable
from ..settings import MLFLOW_DATABASE
from .mlflow_server import ENVIRONMENT, artifact_root, client_uri, embedded_uri, without_password
from .sql.engine import check_encoding, is_shared

for _name, _value in ENVIRONMENT.items():  # read by MLflow while it is imported
    os.environ.setdefault(_name, _value)

import mlflow  # noqa: E402
from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: E402

EXPERIMENT = "adapters"
REGISTRY_ID = "adapterctl.registry_id"
ADAPTER_ID = "adapterctl.adapter_id"
VERSION_ID = "adapterctl.version_id"
KEY = "adapterctl.key"
KIND = "adapterctl.kind"
PARENT_RUN = "mlflow.parentRunId"
#: MLflow takes no longer digest of a dataset.
DATASET_DIGEST = 32
MISSING = "RESOURCE_DOES_NOT_EXIST"
EXISTS = "RESOURCE_ALREADY_EXISTS"

_SQLITE = b"SQLite format 3\x00"

P = ParamSpec("P")
T = TypeVar("T")
_global_uri = Lock()


def in_our_words(method: Callable[P, T]) -> Callable[P, T]:
    """Let the errors of MLflow, of the disk and of S3 leave as `Unavailable`."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except (MlflowException, SQLAlchemyError) as error:  # the latter where MLflow opens its own database
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
            # what the database said; SQLAlchemy may put words of its own before it
            said = cause.orig if isinstance(cause, DBAPIError) else error
            reason = str(said).strip().partition("\n")[0]
            raise Unavailable(
                f"MLflow refused: {reason}",
                hint="run `adapterctl doctor`",
                abroad="the database of MLflow cannot be used now" if isinstance(cause, SQLAlchemyError) else None,
            ) from error
        except OSError as error:
            raise Unavailable(f"files of a version: {error}", hint="check the disk and its rights") from error
        except ModuleNotFoundError as error:
            hint = "pip install 'adapterctl[service]'"
            raise Unavailable(
                f"the store of the files needs {error.name}, which is not installed", hint=hint
            ) from error
        except _s3_errors() as error:
            hint = "check the bucket, MLFLOW_S3_ENDPOINT_URL and AWS_*"
            raise Unavailable(f"S3 refused: {error}", hint=hint) from error

    return call


def _s3_errors() -> tuple[type[Exception], ...]:
    """What S3's client raises, which MLflow passes on as it is; nothing where that client was never loaded."""
    botocore, boto3 = sys.modules.get("botocore.exceptions"), sys.modules.get("boto3.exceptions")
    if botocore is None or boto3 is None:
        return ()
    return (botocore.BotoCoreError, botocore.ClientError, boto3.Boto3Error)


@contextmanager
def missing_is_fine() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != MISSING:
            raise


def dataset_input(name: str, digest: str, *, context: str) -> DatasetInput:
    """A dataset as MLflow shows it with a run; an address on the web becomes a link there."""
    on_the_web = name.startswith(("http://", "https://"))
    dataset = Dataset(
        name=name[:500],
        digest=digest[:DATASET_DIGEST],
        source_type="http" if on_the_web else "local",
        source=json.dumps({"url" if on_the_web else "uri": name}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


@in_our_words
def _connect(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@in_our_words
def make_database(home: Path) -> None:
    """Make MLflow's embedded database where there is none. The caller holds a lock.

    It takes MLflow seconds and dozens of migrations, one after the other; whoever is killed in between would leave a
    database that MLflow can neither use nor go on with. So it gets its name when it is complete.
    """
    database, unfinished = home / MLFLOW_DATABASE, home / f"{MLFLOW_DATABASE}.unfinished"
    if database.exists() or not os.access(home, os.W_OK):
        return
    unfinished.unlink(missing_ok=True)
    unfinished.with_name(f"{unfinished.name}-journal").unlink(missing_ok=True)
    uri = f"sqlite:///{unfinished.absolute()}"
    SqlAlchemyStore(uri, artifact_root(home)).engine.dispose()
    os.replace(unfinished, database)


def _check_can_open(database: Path) -> None:
    """Say at once what MLflow would find out by trying ten times in two minutes."""
    if not database.exists():
        if not os.access(database.parent, os.W_OK):
            raise NotAllowed(f"{database} cannot be made", hint="check the rights of that folder")
    elif not os.access(database, os.R_OK):
        raise NotAllowed(f"{database} cannot be read", hint="check its rights")
    elif not database.is_file() or _first_bytes(database) not in (_SQLITE, b""):
        raise Corrupt(f"{database} is no SQLite database", hint="restore it from a backup")


@in_our_words
def _check_encoding(uri: str) -> None:
    """Say what the first text that cannot be kept would tell. A server that does not answer is left to MLflow."""
    engine = create_engine(uri, poolclass=NullPool)
    with suppress(DBAPIError), engine.connect() as connection:
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        check_encoding(encoding, engine.url, "mlflow_uri")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_SQLITE))


class Mlflow:
    """The experiment `adapters` of one MLflow, which carries the id of the ledger that it belongs to."""

    def __init__(self, tracking_uri: str | None, home: Path, registry_id: str, artifacts: str | None = None) -> None:
        self.uri = client_uri(tracking_uri or embedded_uri(home))
        if self.uri == embedded_uri(home):
            _check_can_open(home / MLFLOW_DATABASE)
        elif is_shared(self.uri):
            _check_encoding(self.uri)
        self.client = _connect(self.uri)
        self._artifacts = artifacts or artifact_root(home)
        self._registry_id = registry_id
        self._remote = self.uri.startswith(("http://", "https://"))
        self._experiment: str | None = None

    @property
    def experiment_id(self) -> str:
        """Made when it is first needed."""
        if self._experiment is None:
            self._experiment = self.find_experiment() or self._create_experiment()
        return self._experiment

    def find_experiment(self) -> str | None:
        """Raise `Misconfigured` where the experiment belongs to another registry. Writes nothing."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return None
        if experiment.lifecycle_stage != "active":
            raise Misconfigured(f"MLflow's experiment {EXPERIMENT!r} was deleted", hint="restore it in MLflow")
        owner = experiment.tags.get(REGISTRY_ID)
        if owner != self._registry_id:
            raise Misconfigured(
                f"MLflow's experiment {EXPERIMENT!r} belongs to {f'registry {owner}' if owner else 'someone else'},"
                f" the ledger is registry {self._registry_id}",
                hint=f"{without_password(self.uri)} was made with another home; use that one",
            )
        return str(experiment.experiment_id)

    def known_experiment(self) -> str | None:
        """As `find_experiment`, and from now on it is never made anew: the database may be emptied under a server."""
        found = self.find_experiment()
        self._experiment = self._experiment or found
        return found

    def _create_experiment(self) -> str:
        # without a location of its own, MLflow would write to ./mlruns of whoever runs the command
        location = None if self._remote else self._artifacts
        try:
            return str(self.client.create_experiment(EXPERIMENT, location, tags={REGISTRY_ID: self._registry_id}))
        except MlflowException as error:
            found = self.find_experiment() if error.error_code == EXISTS else None
            if found is None:
                raise
            return found

    # runs

    def runs(self, condition: str) -> list[Run]:
        """Oldest first. A run in the answer of a search lacks its model inputs."""
        return list(self.client.search_runs([self.experiment_id], condition, order_by=["start_time ASC"]))

    def find_run(self, condition: str) -> Run | None:
        found = self.runs(condition)
        return self.client.get_run(found[0].info.run_id) if found else None

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> None:
        """Log any number of them to a run; they are there when this returns, whatever MLflow's settings say of that."""
        self.client.log_batch(run_id, metrics, params, tags, synchronous=True)

    def link_inputs(self, run: Run, model_ids: Sequence[str]) -> None:
        """Make LoggedModels inputs of a run that was just read; those that are linked already are left out."""
        known = {each.model_id for each in (run.inputs.model_inputs if run.inputs else None) or ()}
        missing = [LoggedModelInput(each) for each in dict.fromkeys(model_ids) if each not in known]
        if missing:
            self.client.log_inputs(run.info.run_id, models=missing)

    def finish_run(self, run: Run) -> None:
        if run.info.status != "FINISHED":
            self.client.set_terminated(run.info.run_id, "FINISHED")

    # files

    def write_files(self, run_id: str, files: Mapping[str, str | bytes]) -> None:
        """Store texts and pictures as artifacts of a run, by path; a file that is there is replaced."""
        with TemporaryDirectory(prefix="adapterctl-") as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            self.client.log_artifacts(run_id, folder)

    def read_file(self, run_id: str, name: str) -> bytes:
        with TemporaryDirectory(prefix="adapterctl-") as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()

    @contextmanager
    def download(self, uri: str, wanted: Collection[str] | None = None) -> Iterator[Path]:
        """The artifacts at a location, in a temporary folder; of those not `wanted` empty files with their names."""
        with TemporaryDirectory(prefix="adapterctl-") as folder:
            if wanted is None:
                yield self._download_to(uri, folder)
            else:
                self._download_some(uri, Path(folder), wanted)
                yield Path(folder)

    @in_our_words
    def _download_to(self, uri: str, folder: str) -> Path:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=self.uri))

    @in_our_words
    def _download_some(self, uri: str, folder: Path, wanted: Collection[str]) -> None:
        """Names two levels deep, so that who misses a file can tell where it is; bytes only of what is wanted."""
        repository = get_artifact_repository(uri, tracking_uri=self.uri)
        for entry in repository.list_artifacts():
            if entry.is_dir:
                (folder / entry.path).mkdir()
                for inner in repository.list_artifacts(entry.path):
                    (folder / inner.path).touch()
            elif entry.path in wanted:
                repository.download_artifacts(entry.path, dst_path=str(folder))
            else:
                (folder / entry.path).touch()

    @in_our_words
    def has_files(self, uri: str) -> bool:
        return bool(get_artifact_repository(uri, tracking_uri=self.uri).list_artifacts())

    @in_our_words
    def delete_files(self, uri: str) -> None:
        """Delete what lies at an artifact location; fine where nothing does."""
        get_artifact_repository(uri, tracking_uri=self.uri).delete_artifacts()

    @in_our_words
    def size_of_files(self, uri: str) -> int:
        """The bytes at an artifact location; 0 where nothing is."""
        repository = get_artifact_repository(uri, tracking_uri=self.uri)
        size, folders = 0, [""]
        while folders:
            for entry in repository.list_artifacts(folders.pop() or None):
                if entry.is_dir:
                    folders.append(entry.path)
                else:
                    size += entry.file_size or 0
        return size

    def artifact_uri(self, kind: Literal["run", "model"], location: str) -> str:
        """The artifact location behind `runs:/` or `models:/`. Raises `NotFound`."""
        try:
            if kind == "run":
                run_id, _, path = location.partition("/")
                return f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
            name, at, alias = location.partition("@")
            name, slash, number = (name, at, "") if at else location.partition("/")
            if not slash:
                return str(self.client.get_logged_model(name).artifact_location)
            if at:
                number = self.client.get_model_version_by_alias(name, alias).version
            return str(self.client.get_model_version_download_uri(name, number))
        except MlflowException as error:
            raise NotFound(f"MLflow has no {kind} {location!r}", hint="its pages show what there is") from error

    @contextmanager
    def as_global_uri(self) -> Iterator[None]:
        """Let MLflow's global tracking URI be ours for a moment, and what it was afterwards.

        MLflow's SQL store looks up the LoggedModel of a new version through the global URI, whatever the client's own.
        """
        if self._remote:
            yield
            return
        with _global_uri:
            before = mlflow.get_tracking_uri() if mlflow.tracking.is_tracking_uri_set() else None
            mlflow.set_tracking_uri(self.uri)
            try:
                yield
            finally:
                mlflow.set_tracking_uri(before)
