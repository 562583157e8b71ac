"""Take in what was measured elsewhere: the output of lm-eval, our own JSON, or the metrics of an MLflow run.

Such figures become metrics of the version, marked by where they come from. They have no samples, so nothing can be
paired with them, and a gate can ask for figures that this registry computed itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..domain.errors import InvalidInput, Problem, Refused, raise_all
from ..domain.evals import HERE
from ..domain.version import AdapterVersion
from ..ports import Ledger, VersionStore
from .read_yaml import read_limited

MAX_RESULT_BYTES = 64 << 20
MAX_METRICS = 1000
HINT = "docs/evaluation.md says which files are understood"
#: What the source of such a metric begins with.
IMPORTED = "imported from "
_NAME = re.compile(r"[\w./ -]{1,250}", re.ASCII)
_RUN = re.compile(r"runs:/([\w-]{1,64})/?")


def read_results(path: Path) -> tuple[str, dict[str, float]]:
    """The metrics of a result file, and what to call their source: the kind of file, its name and its digest."""
    content = read_limited(path, MAX_RESULT_BYTES, hint=HINT)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}", hint=HINT) from error
    kind, metrics = _understood(value, path)
    return f"{kind} {path.name} sha256:{hashlib.sha256(content).hexdigest()[:16]}", check_metrics(metrics)


def import_results(
    ledger: Ledger,
    version: AdapterVersion,
    *,
    source: str,
    metrics: Mapping[str, float] | None,
    replace: bool = False,
    open_versions: Callable[[], VersionStore],
) -> None:
    """Put the metrics on the version. Without any, the source is a run of MLflow. Equal ones are not put there twice.

    Raises `NotFound` for a run that is not there, `InvalidInput` for one without metrics, or another source, and
    `Refused`, without taking any, where the version has one of them with another value, unless that may be `replace`d;
    and in any case where this registry measured one of them itself: that figure has samples behind it.
    """
    if metrics is None:
        run = _RUN.fullmatch(source)
        if run is None:
            raise InvalidInput(f"{source[:200]!r} is neither a file nor runs:/ID", hint=HINT)
        metrics = {key.replace(" ", "_"): value for key, value in open_versions().run_metrics(run[1]).items()}
    told = f"{IMPORTED}{source}"
    found = check_metrics(metrics)
    current, sources = ledger.metrics([version.id]).get(version.id, {}), ledger.metric_sources(version.id)
    measured = [key for key in found if sources.get(key, "").startswith(HERE)]
    if measured:
        raise Refused(
            f"this registry measured itself, on {version.label}: {', '.join(measured)[:500]}",
            hint="leave these out, or import them under other names; nothing was taken",
        )
    other = [key for key, value in found.items() if current.get(key, value) != value]
    if other and not replace:
        values = ", ".join(f"{key} {current[key]:g} ({sources[key]}), now {found[key]:g}" for key in other)
        raise Refused(
            f"{version.label} has other values already: {values[:1000]}",
            hint="to replace them: adapterctl eval import --replace; nothing was taken",
        )
    fresh = {key: value for key, value in found.items() if key not in current or key in other}
    if fresh:
        ledger.set_metrics(version.id, fresh, source=told)


def check_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as numbers. Raises `InvalidInput` with every one that is none, or that has no possible name."""
    problems = [
        Problem("metric", f"{key[:80]!r} is {str(value)[:40]}, expected a name and a finite number")
        for key, value in metrics.items()
        if not _NAME.fullmatch(key)
        or isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
    ]
    if not 1 <= len(metrics) <= MAX_METRICS:
        problems.append(Problem("metrics", f"there are {len(metrics)}, expected 1 to {MAX_METRICS}"))
    raise_all(InvalidInput, "these results cannot be taken:", problems[:20], hint=HINT)
    return {key: float(value) for key, value in metrics.items()}


def _understood(value: Any, path: Path) -> tuple[str, dict[str, Any]]:
    if isinstance(value, dict) and isinstance(value.get("results"), dict):
        return "lm-eval", _lm_eval(value["results"])
    if isinstance(value, dict) and isinstance(value.get("metrics"), dict):
        return "file", value["metrics"]
    raise InvalidInput(
        f'{path} is neither lm-eval\'s output (an object with "results") nor {{"metrics": {{NAME: NUMBER}}}}', hint=HINT
    )


def _lm_eval(results: Mapping[str, Any]) -> dict[str, Any]:
    """`{task: {"metric,filter": number}}` as `task/metric`, with the filter behind it where there is one.

    Standard errors are left out: they are of another interval than ours.
    """
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items() if isinstance(metrics, dict) else ():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, str) or value is None:
                continue
            found[f"{task}/{metric}" + (f".{chosen}" if chosen not in ("", "none") else "")] = value
    return found
