"""The one composition root: settings in, a working registry out. Used by `adapterctl.connect()`, the command line and
the supervisor; nothing else makes a store.

A command that writes makes the home, brings the tables up to date and gives the registry its identity; one that only
reads does none of that, and works where the home cannot be written. Which registry it is follows from the addresses
that are set: `server` means another machine, `database_url` a shared ledger, neither of them the home.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .registry.domain.errors import InvalidInput, Misconfigured, NotFound
from .registry.settings import MLFLOW_DATABASE, Settings, check_address, load_settings

# Everything else is imported where it is used: a command that goes to a server needs no SQLAlchemy and no services.
if TYPE_CHECKING:
    from .migrations import Migration
    from .registry.api import RegistryAPI
    from .registry.domain.evals import EvalReport
    from .registry.domain.job import Job, NewJob
    from .registry.domain.suite import Suite
    from .registry.domain.version import AdapterVersion, FileRecord
    from .registry.ports import Doorbell, VersionStore
    from .registry.rest.client import RemoteRegistry
    from .registry.rest.door import Door
    from .registry.services.local import LocalRegistry
    from .registry.services.schedule import JobHandler
    from .registry.stores.sql.ledger import SqlLedger

_log = logging.getLogger("adapterctl")


def open_registry(settings: Settings | None = None, *, readonly: bool = False) -> RegistryAPI:
    """The registry of `settings` (default: those of this process), wherever it is; see `connect` for `readonly`."""
    settings = settings or load_settings()
    if settings.server:
        return remote(settings.server, settings.token)
    return connect(settings, readonly=readonly)


def remote(server: str, token: str | None) -> RemoteRegistry:
    """The registry that another machine serves."""
    from .registry.rest.client import RemoteRegistry

    return RemoteRegistry(server, token, OwnFiles())


def connect(settings: Settings | None = None, *, readonly: bool = False) -> LocalRegistry:
    """Open the registry that this process itself works on, making it unless `readonly`.

    With `readonly`, and where there is no registry yet, reading from it raises `NotFound`; what needs no registry, such
    as the list of merge methods, works all the same.

    Raises:
        Misconfigured: the tables are those of a newer adapterctl, MLflow belongs to another registry, or it cannot
            name a file in that home; or it is not certain where the password in an address ends.
        NotAllowed: the home cannot be written.
        Unavailable: the database server cannot be reached.
    """
    from .migrations import check_schema, migrate
    from .registry.services.local import LocalRegistry
    from .registry.stores.hub import hub_folder
    from .registry.stores.sql.access import SqlAccess
    from .registry.stores.sql.engine import Database
    from .registry.stores.sql.ledger import SqlLedger

    settings = settings or load_settings()
    url = _ledger_url(settings)
    if settings.database_url:
        for name in ("mlflow_uri", "broker_url"):
            check_address(name, getattr(settings, name) or "")
    database = Database(url)
    if not readonly:
        migrate(url)
    elif database.exists:
        check_schema(url)
    ledger = SqlLedger(database)
    if not readonly:
        try:
            _establish(ledger, settings)
        except Misconfigured:
            ledger.close()
            raise
    stores = _Stores(settings, ledger)
    return LocalRegistry(
        settings,
        ledger,
        _bell(settings, ledger),
        SqlAccess(database),
        open_versions=stores.open_versions,
        folders=stores.folder,
        open_hub=hub_folder,
        made_on_demand=made_on_demand(),
    )


def migrate_tables(settings: Settings, *, check: bool = False) -> Migration:
    """Bring the tables of the ledger up to date; with `check` raise `Refused` where they are not, and write nothing."""
    from .migrations import check_newest, migrate

    if settings.server:
        raise InvalidInput(
            f"commands go to the server at {settings.server}, which looks after its tables itself",
            hint="run it where the server runs, with its settings; or name a home: --home DIR",
        )
    return (check_newest if check else migrate)(_ledger_url(settings))


def _ledger_url(settings: Settings) -> str:
    """Raises `Misconfigured` for what cannot be the place of a registry."""
    from .registry.stores.sql.engine import is_shared, sqlite_url

    if settings.database_url and not is_shared(settings.database_url):
        raise Misconfigured("database_url is no postgresql:// address", hint="for a registry in files, set home")
    if not settings.database_url and {"?", "%"} & set(str(settings.home)):
        # MLflow takes an address, where the one begins options and the other a number, and makes folders beside ours
        raise Misconfigured(f"the home {settings.home} has a '?' or a '%' in its path", hint="give another: --home DIR")
    return settings.database_url or sqlite_url(settings.home)


def _bell(settings: Settings, ledger: SqlLedger) -> Doorbell:
    """Where workers wait for a broker's messages nobody is started here."""
    from .registry.services.fleet import queue_of
    from .registry.stores.celery_bell import CeleryBell
    from .registry.stores.spawn_bell import SpawnBell

    if settings.broker_url and not settings.database_url:
        raise Misconfigured(
            "a broker wakes the workers of a shared registry, and this one is in a home",
            hint="unset ADAPTERCTL_BROKER_URL, or set ADAPTERCTL_DATABASE_URL",
        )
    if settings.broker_url:
        return CeleryBell(settings.broker_url, lambda job_id: queue_of(ledger, job_id))
    return SpawnBell(settings)


class OwnFiles:
    """What commands that go to a server do with files of this machine; each verb imports what it needs."""

    def check_folder(self, folder: Path) -> None:
        from .registry.services.register import check_folder

        check_folder(folder)

    def load_suite(self, path: Path) -> Suite:
        from .registry.services.suites import load_suite

        return load_suite(path)

    def fingerprints(self, folder: Path) -> Mapping[str, str]:
        from .registry.services.bases import fingerprints

        return fingerprints(folder)

    def read_reports(self, folder: Path) -> list[EvalReport]:
        from .registry.services.evaluate import read_reports

        return read_reports(folder)

    def pull(
        self, label: str, files: Sequence[FileRecord], target: Path, fetch: Callable[[FileRecord, Path], None]
    ) -> None:
        from .registry.services.pull import pull

        pull(label, files, target, fetch)


def application(registry: LocalRegistry, *, hosts: Sequence[str], loopback: bool) -> Door:
    """What `adapterctl serve` serves: our verbs, and MLflow's own pages and API behind the same door.

    Where no token was ever made, everyone who can reach the server may do everything. So that is done on a loopback
    address only, and not where the settings name others who are led there; nor again once every token has ended.
    """
    from . import __version__
    from .registry.rest.app import LOOPBACK, create_app
    from .registry.rest.door import Rules, everyone
    from .registry.stores.mlflow_server import application as mlflow_application

    settings = registry.settings
    is_open = loopback and set(settings.allowed_hosts) <= {*LOOPBACK} and not registry.access.tokens()
    if not is_open and not registry.access.has_tokens():
        raise Misconfigured(
            "a server that others can reach, or that had a token, needs a valid token first",
            hint="adapterctl tokens create NAME --scope admin",
        )
    _log.info("tokens are %s", "not asked for: this machine only, and none was made" if is_open else "asked for")
    store = registry.version_store  # opens MLflow, and makes its tables where there are none
    rules = Rules(
        hosts=(*hosts, *settings.allowed_hosts),
        upload_bytes=settings.max_upload_mb << 20,
        anyone=everyone(settings.actor) if is_open else None,
    )
    mlflow_app = mlflow_application(store.uri, settings)
    return create_app(registry, registry.access, rules, mlflow_app, version=__version__)


def mlflow_app() -> Door:
    """For `mlflow server --app-name adapterctl`: what `adapterctl serve` serves, started by MLflow's own command.

    Nobody tells us on which address it listens, so a token is asked for, always. The registry is that of our settings;
    its MLflow is the one that it was made with.
    """
    from .registry.rest.app import LOOPBACK, own_names
    from .registry.stores.mlflow_server import STORE, client_uri, hosts_of_command

    registry = connect()
    asked = os.environ.get(STORE)
    if asked and client_uri(asked) != registry.version_store.uri:
        _log.warning("--backend-store-uri is ignored: this registry belongs to %s", registry.ledger.mlflow_uri)
    return application(registry, hosts=(*LOOPBACK, *own_names(), *hosts_of_command()), loopback=False)


def made_on_demand() -> Mapping[str, str]:
    """Bases that are made where they are needed first, each from the package that carries its weights."""
    from .examples import BASE_NAME, BASE_PACKAGE

    return {BASE_NAME: BASE_PACKAGE}


def _establish(ledger: SqlLedger, settings: Settings) -> None:
    """Tie a new registry to its MLflow. Ledger and MLflow are both in the home, or both shared: one truth.

    One that was made keeps its MLflow. In a home another address is ignored, for MLflow's own programs read it, too.
    """
    from .registry.services.doctor import check_in_place
    from .registry.stores.mlflow_server import embedded_uri, is_in_files, without_password

    uri = settings.mlflow_uri or ("" if settings.database_url else embedded_uri(settings.home))
    if settings.database_url and is_in_files(uri):
        raise Misconfigured(
            "a shared ledger needs a shared MLflow",
            hint="set ADAPTERCTL_MLFLOW_URI to postgresql://… or to the address of a tracking server",
        )
    stored = without_password(uri)
    try:
        known = ledger.mlflow_uri
    except NotFound:
        if not settings.database_url and not uri.startswith("sqlite:"):
            raise Misconfigured(
                f"an embedded registry cannot keep its versions in {uri.partition(':')[0]} MLflow",
                hint="unset MLFLOW_TRACKING_URI (and ADAPTERCTL_MLFLOW_URI), or set it to a sqlite:/// address",
            ) from None
        ledger.establish(stored)
        known = ledger.mlflow_uri
    # an MLflow that is asked for by its address may be made in a new folder
    if not settings.database_url and (stored != known or (settings.home / MLFLOW_DATABASE).exists()):
        check_in_place(settings.home, known)
    if not settings.mlflow_uri or stored == known:
        return
    if settings.database_url:
        raise Misconfigured(
            f"this registry belongs to the MLflow at {known}, not {stored}",
            hint="set ADAPTERCTL_MLFLOW_URI to that address",
        )
    _log.warning("MLFLOW_TRACKING_URI is ignored: this registry belongs to %s", known)


def job_handlers(registry: LocalRegistry) -> Mapping[str, JobHandler]:
    """What the supervisor can do, by kind of job; in a process of ours, for which no model of MLflow's is active."""
    from .registry.stores.mlflow_server import ACTIVE_MODEL

    for name in ACTIVE_MODEL:
        os.environ.pop(name, None)
    # Here, before there are threads. MLflow imports it while it opens its store, and a statement that the thread of a
    # lease builds in that moment meets a module that is half there: the thread died, and the job with it.
    import sqlalchemy.orm  # noqa: F401

    from .registry.services.beside import beside
    from .registry.services.evaluate import EvalHandler, evaluation_of_merge
    from .registry.services.merge import MergeHandler
    from .registry.services.rebuild import RebuildHandler, following
    from .registry.services.recall import RecallHandler
    from .registry.services.tune import TuneHandler
    from .registry.services.verify import VerifyHandler

    tell_errors_once()
    settings, ledger, folders = registry.settings, registry.ledger, registry.folders

    def merges(then: Callable[[Job, str], Sequence[NewJob]]) -> MergeHandler:
        return MergeHandler(
            ledger,
            open_versions=lambda: registry.version_store,
            folders=folders,
            home=settings.home,
            threads=settings.threads,
            then=then,
            bell=registry.bell,
        )

    def evaluation(job: Job, version_id: str) -> list[NewJob]:
        return evaluation_of_merge(ledger, job, version_id, settings=settings, made_on_demand=registry.made_on_demand)

    return {
        "merge": merges(evaluation),
        "rebuild": RebuildHandler(
            ledger, merges(lambda job, made: [*following(ledger, job, made), *evaluation(job, made)])
        ),
        "eval": EvalHandler(
            ledger,
            settings,
            open_versions=lambda: registry.version_store,
            folders=folders,
            beside=lambda version, suite, dtype: beside(ledger, version, suite, dtype),
            made_on_demand=registry.made_on_demand,
        ),
        "recall": RecallHandler(ledger, open_versions=lambda: registry.version_store),
        "tune": TuneHandler(
            ledger,
            settings,
            open_versions=lambda: registry.version_store,
            folders=folders,
            bell=registry.bell,
            made_on_demand=registry.made_on_demand,
        ),
        "verify": VerifyHandler(ledger, folders=folders, home=settings.home, threads=settings.threads),
    }


def tell_errors_once() -> None:
    """MLflow logs a traceback of every error of its database, and raises it; our commands and workers tell it."""
    logging.getLogger("mlflow.store.db.utils").addFilter(_no_traceback)


def _no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def log_to_stderr(*names: str) -> None:
    """Let these loggers write one JSON object a line to stderr: the log of a server, and of a worker."""

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            said = record.getMessage()
            at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            line = {"at": at.replace("+00:00", "Z"), "level": record.levelname, "log": record.name}
            if record.name == "adapterctl.http":  # an object itself: its fields follow ours
                return f"{json.dumps(line)[:-1]}, {said[1:]}"
            line["message"] = said
            if record.exc_info:
                line["traceback"] = self.formatException(record.exc_info)
            return json.dumps(line)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in names:
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)


def warm_up() -> None:
    """Import what registration needs, while a child computes."""
    from .registry.stores import mlflow_versions  # noqa: F401


class _Stores:
    """The version store and the files of versions; MLflow is imported when one of them first needs it."""

    def __init__(self, settings: Settings, ledger: SqlLedger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._versions: VersionStore | None = None

    def open_versions(self) -> VersionStore:
        if self._versions is None:
            # deferred: MLflow takes 1.6 s, and reads of the registry never need it
            from .registry.services.drift import check_not_emptied
            from .registry.stores.mlflow_access import make_database
            from .registry.stores.mlflow_server import embedded_uri
            from .registry.stores.mlflow_versions import MlflowVersions

            settings = self._settings
            # the ledger keeps no password, so a shared MLflow's address comes from the settings
            uri = settings.mlflow_uri if settings.database_url else self._ledger.mlflow_uri
            new = not self._ledger.has_versions()
            # MLflow makes its tables when it is opened first, and two that do so at once disturb each other
            with self._ledger.exclusive("mlflow") if new else nullcontext():
                if new and uri == embedded_uri(settings.home):
                    make_database(settings.home)
                store = MlflowVersions(uri, settings.home, self._ledger.registry_id, settings.artifacts)
                check_not_emptied(self._ledger, store)
            self._versions = store
        return self._versions

    @contextmanager
    def folder(self, version: AdapterVersion) -> Iterator[Path]:
        from .registry.stores.artifacts import own_folder

        own = own_folder(version)  # without MLflow where it can be: `pull` and `verify` start four times as fast
        if own is not None:
            yield own
            return
        with self.open_versions().folder(version) as downloaded:
            yield downloaded
