"""The shape of `-o json` of every command that prints data: which keys, of which types. Programs read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from adapterctl.registry.domain.job import JobState, NewJob, Progress
from adapterctl.registry.stores.sql.ledger import SqlLedger

COMMANDS = {
    "ls": "ls",
    "ls-versions": "ls translate",
    "show": "show translate:v2",
    "show-merge": "show translate-chat:v1",
    "diff": "diff translate:v1 translate:v2",
    "diff-layers": "diff translate-chat:v1 translate:v1 --layers",
    "plan": "plan translate:v2 chat:v1",
    "methods": "methods",
    "method": "methods svd",
    "lineage": "lineage translate-chat:v1",
    "history": "history translate",
    "events": "history --kind merge",
    "base-ls": "base ls",
    "doctor": "doctor",
    "serve-links": "serve --links",
}
# Their keys are the user's own, or those of a document with a version of its own.
FREE = {"metrics", "params", "tags", "recipe", "receipt", "spec", "result", "stages", "fields", "default", "retention"}


@pytest.mark.parametrize("name", COMMANDS)
def test_json_has_the_shape_it_had(name: str, read: Callable[..., Any], golden: Callable[[str, str], None]):
    value = read(*COMMANDS[name].split(), "-o", "json", code=None).data

    golden(f"json/{name}.json", json.dumps(shape(value), indent=2) + "\n")


def test_a_job_that_was_seen_at_work_has_the_shape_it_had(
    run: Callable[..., Any], sql_ledger: SqlLedger, golden: Callable[[str, str], None]
):
    """How far a merge is is told at the next renewal of its lease; a small one may have ended by then."""
    sql_ledger.submit(NewJob("merge", "key", "merge a b", {}, "ada"))
    job = sql_ledger.claim("host:1", 60.0)
    assert job is not None
    sql_ledger.renew(job.id, job.attempt, 60.0, Progress("merging", 1, 4))
    sql_ledger.finish(job.id, job.attempt, JobState.SUCCEEDED, result={})

    golden("json/jobs-ls.json", json.dumps(shape(run("jobs", "ls", "-o", "json").data), indent=2) + "\n")


def shape(value: Any, key: str = "") -> Any:
    """The value with types in place of facts; a list by its first item, free mappings not looked into."""
    if key in FREE:
        return "any"
    if isinstance(value, dict):
        return {name: shape(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "null" if value is None else type(value).__name__
