"""One of several clients: asks for merges until each was accepted, however often it is killed or refused on the way.

    python chaos/client.py ORDERS.json ACCEPTED.jsonl PAUSE

PAUSE is in seconds, between two questions.

An accepted merge is one line in ACCEPTED.jsonl. A client that is started again asks anew for what has no line there;
it cannot know whether its last question was heard, and need not. The registry is that of the environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterctl.bootstrap import open_registry
from adapterctl.registry.api import RegistryAPI
from adapterctl.registry.domain.errors import AdapterctlError, Conflict, NotFound, Unavailable
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent


def main(orders: Path, accepted: Path, pause_s: float) -> int:
    asked = json.loads(orders.read_text(encoding="utf-8"))
    while left := _left(asked, accepted):
        try:
            registry = open_registry()
            for order in left:
                if _submit(registry, order, accepted):
                    time.sleep(pause_s)
        except (Unavailable, Conflict) as error:
            sys.stderr.write(f"{error}\n")  # a person would try again
        time.sleep(min(pause_s, 1.0))
    return 0


def _left(asked: list[dict[str, Any]], accepted: Path) -> list[dict[str, Any]]:
    lines = accepted.read_text(encoding="utf-8").splitlines() if accepted.exists() else []
    # a line that was cut short by a kill or a full disk says nothing
    done = {json.loads(line)["number"] for line in lines if line.endswith("}")}
    return [order for order in asked if order["number"] not in done]


def _submit(registry: RegistryAPI, order: Mapping[str, Any], accepted: Path) -> bool:
    """Whether there was an answer."""
    parents = tuple(parse_parent(f"{label}={weight!r}") for label, weight in order["parents"])
    answer: dict[str, Any] = {"number": order["number"]}
    try:
        submitted = registry.merge(MergeRequest(parents, into=order["into"]))
    except NotFound:
        return False  # a parent is still being made: asked again in the next round
    except (Unavailable, Conflict):
        raise
    except AdapterctlError as error:
        answer["refused"] = f"{error.code}: {error.message}"
    else:
        answer["recipe"] = submitted.recipe_digest
        answer["job"] = submitted.job.id if submitted.job else None
        answer["version"] = submitted.version.ref if submitted.version else None
    with accepted.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(answer))  # the line break first: it ends a line that was cut short
    return True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])))
