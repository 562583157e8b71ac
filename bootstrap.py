"""The one composition root: settings in, a working registry out. Used by `adapterctl.connect()`, the command line and
the supervisor; nothing else makes a store.

A command that writes makes the home, brings the tables up to date and gives the registry its identity; one that only
reads does none of that, and works where the home cannot be written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .examples import BASE_NAME, BASE_PACKAGE
from .migrations import check_schema, migrate
from .registry.domain.errors import Misconfigured, NotFound
from .registry.domain.version import AdapterVersion
from .registry.ports import VersionStore
from .registry.services.evaluate import EvalHandler, evaluation_of_merge
from .registry.services.local import LocalRegistry
from .registry.services.merge import MergeHandler
from .registry.services.schedule import JobHandler
from .registry.services.verify import VerifyHandler
from .registry.settings import Settings, load_settings
from .registry.stores.artifacts import local_folder
from .registry.stores.hub import hub_folder
from .registry.stores.mlflow_server import embedded_uri
from .registry.stores.spawn_bell import SpawnBell
from .registry.stores.sql.engine import Database, sqlite_url
from .registry.stores.sql.ledger import SqlLedger

#: Bases that are made where they are needed first, each from the package that carries its weights.
MADE_ON_DEMAND = {BASE_NAME: BASE_PACKAGE}

_log = logging.getLogger("adapterctl")


def connect(settings: Settings | None = None, *, readonly: bool = False) -> LocalRegistry:
    """Open the registry of `settings` (default: those of this process), making it unless `readonly`.

    With `readonly`, and where there is no registry yet, reading from it raises `NotFound`; what needs no registry, such
    as the list of merge methods, works all the same.

    Raises:
        Misconfigured: the tables are those of a newer adapterctl, or MLflow belongs to another registry.
        NotAllowed: the home cannot be written.
    """
    settings = settings or load_settings()
    url = sqlite_url(settings.home)
    database = Database(url)
    if not readonly:
        migrate(url)
    elif database.exists:
        check_schema(url)
    ledger = SqlLedger(database)
    if not readonly:
        _establish(ledger, settings)
    stores = _Stores(settings, ledger)
    return LocalRegistry(
        settings,
        ledger,
        SpawnBell(settings),
        open_versions=stores.open_versions,
        folders=stores.folder,
        open_hub=hub_folder,
        made_on_demand=MADE_ON_DEMAND,
    )


def _establish(ledger: SqlLedger, settings: Settings) -> None:
    """Tie a new registry to its MLflow. An embedded ledger beside a remote MLflow could not keep one truth."""
    uri = settings.mlflow_uri or embedded_uri(settings.home)
    if not uri.startswith("sqlite:"):
        raise Misconfigured(
            f"an embedded registry cannot keep its versions in {uri.partition(':')[0]} MLflow",
            hint="unset MLFLOW_TRACKING_URI (and ADAPTERCTL_MLFLOW_URI), or set it to a sqlite:/// address",
        )
    ledger.establish(uri)
    if settings.mlflow_uri and settings.mlflow_uri != ledger.mlflow_uri:
        _log.warning("MLFLOW_TRACKING_URI is ignored: this registry belongs to %s", ledger.mlflow_uri)


def job_handlers(registry: LocalRegistry) -> Mapping[str, JobHandler]:
    """What the supervisor can do, by kind of job."""
    settings, ledger, folders = registry.settings, registry.ledger, registry.folders
    return {
        "merge": MergeHandler(
            ledger,
            open_versions=lambda: registry.version_store,
            folders=folders,
            home=settings.home,
            threads=settings.threads,
            then=lambda job, version_id: evaluation_of_merge(
                ledger, job, version_id, settings=settings, made_on_demand=MADE_ON_DEMAND
            ),
        ),
        "eval": EvalHandler(
            ledger,
            settings,
            open_versions=lambda: registry.version_store,
            folders=folders,
            made_on_demand=MADE_ON_DEMAND,
        ),
        "verify": VerifyHandler(ledger, folders=folders, home=settings.home, threads=settings.threads),
    }


def warm_up() -> None:
    """Import what registration needs, while a child computes."""
    # deferred: this is the point
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
            from .registry.stores.mlflow_versions import MlflowVersions

            store = MlflowVersions(self._ledger.mlflow_uri, self._settings.home, self._ledger.registry_id)
            store.check_identity()
            self._versions = store
        return self._versions

    @contextmanager
    def folder(self, version: AdapterVersion) -> Iterator[Path]:
        local = local_folder(version.placement.location)
        if local is None:
            with self.open_versions().folder(version) as downloaded:
                yield downloaded
            return
        if not local.is_dir():
            raise NotFound(f"the files of {version.label} are gone from {local}", hint="see `adapterctl doctor`")
        yield local
