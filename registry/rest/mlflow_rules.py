"""What a token may do in the MLflow that is served beside us: method and path to scope, the first rule that fits.

MLflow's pages are read with any token. Its record of versions is a projection of ours: what moves an alias or a stage,
deletes, renames or writes artifacts could make it say something else than the ledger, and needs `admin`. Logging runs
and metrics needs `merge`. What runs programs, calls other servers or keeps their secrets is closed to everyone.
"""

from __future__ import annotations

import re

from ..domain.access import Scope

_API = r"/(ajax-)?api/\d\.\d"
_MLFLOW = rf"{_API}/mlflow"

#: Assistants, jobs, model gateways, hooks, judges: none is needed for a registry, each acts on the server's behalf.
_CLOSED = re.compile(
    rf"{_MLFLOW}/(assistant|demo|gateway|gateway-proxy|genai|jobs|mcp|mcp-servers|prompt-optimization|review-queues|scorer"
    rf"|scorers|webhooks|workspaces|issues/invoke|runs/create-promptlab-run)(/.*)?|{_API}/(jobs|mcp)(/.*)?|/(gateway|mcp)(/.*)?"
)
#: Reads that are POSTs, because their conditions are long.
_SEARCHES = re.compile(
    rf"{_MLFLOW}/((experiments|runs|logged-models|datasets|issues|traces)/search|experiments/search-datasets"
    r"|registered-models/get-latest-versions|traces/(batchGetInfos|calculate-filter-correlation|metrics)|ui-telemetry)"
    r"|/graphql"
)
_LOGGING = re.compile(
    rf"{_MLFLOW}/(experiments/(create|set-experiment-tag)"
    r"|runs/(create|update|log-batch|log-inputs|log-metric|log-parameter|set-tag))"
)


def needed_scope(method: str, path: str) -> Scope | None:
    """The scope that a request to MLflow needs; None where nobody may. What no rule knows needs `admin`."""
    path = re.sub("/+", "/", path)  # MLflow takes several slashes for one
    if _CLOSED.fullmatch(path):
        return None
    if method in ("GET", "HEAD", "OPTIONS") or (method == "POST" and _SEARCHES.fullmatch(path)):
        return Scope.READ
    if method == "POST" and _LOGGING.fullmatch(path):
        return Scope.MERGE
    return Scope.ADMIN
