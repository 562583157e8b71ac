"""What a token may do in the MLflow that is served beside us: method and path to scope, the first rule that fits.

MLflow's pages are read with any token. Its record of versions is a projection of ours: what moves an alias or a stage,
deletes, renames or writes artifacts could make it say something else than the ledger, and needs `admin`. Logging runs
and metrics needs `merge`, and `admin` where a key of it is one of ours or it says where files go. What runs programs,
calls other servers or keeps their secrets is closed to everyone. Where MLflow's pages only look whether there is any of
it, they are told that there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ..domain.access import Scope

_API = r"/(ajax-)?api/\d\.\d"
_MLFLOW = rf"{_API}/mlflow"

#: Assistants, jobs, model gateways, hooks, judges: none is needed for a registry, each acts on the server's behalf.
_CLOSED = re.compile(
    rf"{_MLFLOW}/(assistant|demo|gateway|gateway-proxy|genai|jobs|mcp|mcp-servers|prompt-optimization|review-queues|scorer"
    rf"|scorers|webhooks|workspaces|issues/invoke|runs/create-promptlab-run)(/.*)?|{_API}/(jobs|mcp)(/.*)?|/(gateway|mcp)(/.*)?",
    re.DOTALL,
)
#: Reads that are POSTs, because their conditions are long.
_SEARCHES = re.compile(
    rf"{_MLFLOW}/((experiments|runs|logged-models|datasets|issues|traces)/search|experiments/search-datasets"
    r"|registered-models/get-latest-versions|traces/(batchGetInfos|calculate-filter-correlation|metrics)|ui-telemetry)"
    r"|/graphql"
)
#: Reads of what is closed, answered as by an MLflow that has none of it. `users` are not closed: MLflow knows them only
#: where it asks for passwords itself, but its pages ask for them at every visit.
_NONE: Mapping[str, object] = {
    "assistant/config": {"providers": {}, "projects": {}, "remote_access_allowed": False},
    "assistant/providers": {"providers": [], "resolved": None, "gateway_vendor_options": {}},
    "gateway-proxy": {"endpoints": []},
    "gateway/budgets/list": {},
    "gateway/budgets/windows": {},
    "gateway/endpoints/bindings/list": {},
    "gateway/endpoints/list": {},
    "gateway/guardrails/list": {},
    "gateway/model-definitions/list": {},
    "gateway/secrets/config": {"secrets_available": False, "using_default_passphrase": False},
    "gateway/secrets/list": {},
    "mcp-servers": {"mcp_servers": [], "next_page_token": None},
    "review-queues/list": {},
    "scorers/list": {},
    "scorers/online-configs": {"configs": []},
    "users/current": {"user": None, "is_basic_auth": False},
    "webhooks": {},
}
#: What can make MLflow say something else than the ledger, and has a name in its body.
_DEEDS = re.compile(rf"{_MLFLOW}/(?P<what>registered-models/(alias|rename|delete)|model-versions/(create|delete))")
_LOGGING = re.compile(
    rf"{_MLFLOW}/(experiments/(create|set-experiment-tag)"
    r"|runs/(create|update|log-batch|log-inputs|log-metric|log-parameter|set-tag))"
)

_OUR_KEYS = "adapterctl."
#: Of an experiment: MLflow writes to whatever place it names, as the server's user. Both spellings are read.
_PLACES = ("artifact_location", "artifactLocation")


def needed_scope(method: str, path: str) -> Scope | None:
    """The scope that a request to MLflow needs; None where nobody may. What no rule knows needs `admin`."""
    path = _plain(path)
    if _CLOSED.fullmatch(path):
        return None
    if method in ("GET", "HEAD", "OPTIONS") or (method == "POST" and _SEARCHES.fullmatch(path)):
        return Scope.READ
    if method == "POST" and _LOGGING.fullmatch(path):
        return Scope.MERGE
    return Scope.ADMIN


def beyond_merge(body: bytes) -> str | None:
    """What of a request that logs is more than `merge` allows, in words; None where nothing is.

    A key of ours, by which versions, runs and registries are told apart, or a place for files on the server. Read as
    MLflow reads it, which takes JSON inside a JSON string, too. What is no JSON, MLflow refuses.
    """
    try:
        said = json.loads(body)
        waiting = [json.loads(said) if isinstance(said, str) else said]
    except RecursionError:
        return "the body is nested too deeply"  # nobody logs such a thing, and MLflow may read deeper than we do
    except ValueError:
        return None
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if str(each.get("key", "")).startswith(_OUR_KEYS):
                return f"tags that begin with {_OUR_KEYS!r} are the registry's"
            if any(each.get(name) for name in _PLACES):
                return "an experiment that says where its files go may write anywhere on the server"
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return None


def deed_of(method: str, path: str) -> str | None:
    """Method and end of the path of a request that is worth a note in the history of an adapter; None for others."""
    found = _DEEDS.fullmatch(_plain(path)) if method in ("POST", "DELETE") else None
    return f"{method} {found['what']}" if found is not None else None


def answer_of_none(method: str, path: str) -> bytes | None:
    """JSON for a read of what is not here, of which MLflow's pages want to know only that; None for all else."""
    found = re.fullmatch(rf"{_MLFLOW}/(?P<what>.+)", _plain(path)) if method in ("GET", "HEAD") else None
    if found is None or found["what"] not in _NONE:
        return None
    return json.dumps(_NONE[found["what"]]).encode()


def _plain(path: str) -> str:
    return re.sub("/+", "/", path)  # MLflow takes several slashes for one
