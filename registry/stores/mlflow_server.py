"""Where MLflow lies, and how its stock pages are served. Imports MLflow only to serve it in this process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..settings import MLFLOW_DATABASE, Settings

#: For every process of ours that imports MLflow; each only where the variable is not set.
ENVIRONMENT: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for data
}

#: MLflow's client ties every metric that names no model to the one of these variables, whoever logs it.
ACTIVE_MODEL = ("MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID")

#: What a server of MLflow must not do here.
SWITCHED_OFF: Mapping[str, str] = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}

#: Private names, as `mlflow server` sets them for its workers.
STORE = "_MLFLOW_SERVER_FILE_STORE"
HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"

POSTGRES = ("postgresql", "postgres")


def embedded_uri(home: Path) -> str:
    """MLflow's tracking and registry address of the embedded registry."""
    return f"sqlite:///{home.absolute()}/{MLFLOW_DATABASE}"


def artifact_root(home: Path) -> str:
    """Where the embedded registry keeps bytes, as the URI that MLflow's experiment is given."""
    return (home.absolute() / "artifacts").as_uri()


def client_uri(uri: str) -> str:
    """The address as MLflow takes it: PostgreSQL through psycopg2.

    Its queries compare numbers with texts, which psycopg 3 passes on with their types and the server then refuses.
    """
    scheme, separator, rest = uri.partition("://")
    return f"postgresql+psycopg2://{rest}" if separator and scheme.partition("+")[0] in POSTGRES else uri


def without_password(uri: str) -> str:
    """The address as it may be stored and shown; a password may stand among its options, too."""
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    options = [each for each in parts.query.split("&") if "password" not in unquote(each.partition("=")[0]).lower()]
    if not user and "&".join(options) == parts.query:
        return uri
    netloc = f"{user.partition(':')[0]}@{host}" if user else host
    return parts._replace(netloc=netloc, query="&".join(options)).geturl()


def is_in_files(uri: str) -> bool:
    """Whether an MLflow at this address, if it is one, is on this machine alone."""
    scheme, separator, _ = uri.partition("://")
    return not separator or scheme.partition("+")[0] in ("sqlite", "file")


def hosts_of_command() -> tuple[str, ...]:
    """Names that `mlflow server --allowed-hosts` was given, without their ports; `*` names nobody."""
    given = (each.strip().lower() for each in os.environ.get(HOSTS, "").split(","))
    return tuple(each.partition(":")[0] for each in given if each and each != "*")


def application(uri: str, settings: Settings) -> Any:
    """MLflow's own ASGI application on the store at `uri`, to be mounted in ours; None where `uri` is a server already.

    Our door stands in front of it, so its own host check is told to let pass what comes that far.
    """
    if uri.startswith(("http://", "https://")):
        return None
    ours = {
        **ENVIRONMENT,
        **SWITCHED_OFF,
        STORE: uri,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": settings.artifacts or artifact_root(settings.home),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        HOSTS: "*",
    }
    os.environ.update(ours)
    with warnings.catch_warnings():
        # MLflow 3.17 uses a module that starlette is about to drop
        warnings.simplefilter("ignore")
        # deferred: seconds, and only this needs it
        from mlflow.server.fastapi_app import app

    return app
