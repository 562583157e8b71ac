"""Somebody who wants to hear of everything that happens, however often it, the server or the database is killed.

    python chaos/listener.py HEARD.jsonl

Each event is one line in HEARD.jsonl; who is started again goes on after the last one. The registry is that of the
environment. Ends only when it is ended.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NoReturn

from adapterctl.bootstrap import open_registry
from adapterctl.registry.domain.errors import Conflict, Unavailable

PAUSE_S = 0.3


def main(heard: Path) -> NoReturn:
    while True:
        try:
            for event in open_registry().follow_events(after=last_heard(heard)):
                with heard.open("a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps([event.id, event.kind, event.ref]))
        except (Unavailable, Conflict) as error:
            sys.stderr.write(f"{error}\n")
        time.sleep(PAUSE_S)


def last_heard(heard: Path) -> int:
    return max((event[0] for event in read_heard(heard)), default=0)


def read_heard(heard: Path) -> list[tuple[int, str, str]]:
    """Id, kind and version of each event, as they came."""
    lines = heard.read_text(encoding="utf-8").splitlines() if heard.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]")]  # and not one that a kill cut short


if __name__ == "__main__":
    main(Path(sys.argv[1]))
