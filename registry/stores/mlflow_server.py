"""Where the embedded MLflow lies, and how its stock pages are served. Does not import MLflow."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ..settings import Settings

#: For every process of ours that imports MLflow; each only where the variable is not set.
ENVIRONMENT: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for data
}


def embedded_uri(home: Path) -> str:
    """MLflow's tracking and registry address of the embedded registry."""
    return f"sqlite:///{home.absolute()}/mlflow.db"


def artifact_root(home: Path) -> str:
    """Where the embedded registry keeps bytes, as the URI that MLflow's experiment is given."""
    return (home.absolute() / "artifacts").as_uri()


def ui_command(
    settings: Settings, *, host: str = "127.0.0.1", port: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command that serves MLflow's own pages on the embedded registry, and what it needs in its environment.

    One worker and no job execution: MLflow's defaults start ten processes and use 1.9 GB. Host names other than
    this machine's are refused by MLflow, so that no page on the web can reach the registry through a browser; and
    nothing of ours is a pickle, so none is loaded.
    """
    port = port or urlsplit(settings.mlflow_ui).port or 5000
    command = [
        *(sys.executable, "-P", "-m", "mlflow", "server"),
        *("--backend-store-uri", embedded_uri(settings.home)),
        *("--artifacts-destination", artifact_root(settings.home)),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", f"localhost:{port},127.0.0.1:{port},{host}:{port}"),
    ]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    return command, {**ENVIRONMENT, **environment}
