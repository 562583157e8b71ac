"""What differs between two versions, over the real ledger and the real files."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

from adapterctl.bootstrap import connect
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.local import LocalRegistry

#: Of a receipt that the first engine wrote.
FIRST_COLUMNS = ("module", "norm", "loss", "stable_rank")


def test_merges_of_the_first_engine_are_compared_layer_by_layer(two_parents: LocalRegistry):
    parents = tuple(map(parse_parent, ("translate:v1", "chat:v1")))
    for method in ("cat", "svd"):
        asked = MergeRequest(parents, into="both", method=method, rank=2 if method == "svd" else None)
        job = two_parents.merge(asked).job
        list(two_parents.follow(job.id, timeout_s=120))
    first, second = map(parse_ref, ("both:v1", "both:v2"))
    now = two_parents.diff(first, second, layers=True).layers
    with closing(sqlite3.connect(two_parents.settings.home / "registry.db")) as ledger, ledger:
        for version_id, body in ledger.execute("SELECT version_id, body FROM version_detail").fetchall():
            detail = json.loads(body)
            if receipt := detail["receipt"]:
                receipt["layers"] = {name: receipt["layers"][name] for name in FIRST_COLUMNS}
            new = json.dumps(detail), version_id
            ledger.execute("UPDATE version_detail SET body = ? WHERE version_id = ?", new)

    again = connect(two_parents.settings)
    with closing(again.ledger):
        then = again.diff(first, second, layers=True).layers

    kept = [[(row.module, row.distance, row.loss) for row in rows] for rows in (then, now)]
    assert kept[0] == kept[1]
    assert {row.predicted_loss for row in then} == {(None, None)}
    assert not any(row.retention for row in then)
