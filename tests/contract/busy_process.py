"""One of several processes that work on one registry at once; `test_concurrency.py` starts them.

    python busy_process.py HOME-OR-ADDRESS NUMBER COMMANDS

Each command is what a command line would do: look, think, write. Prints how many stage moves it won.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adapterctl.registry.domain.errors import StageMoved
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger


def main(place: str, number: int, commands: int) -> None:
    ledger = SqlLedger(Database(place if "://" in place else sqlite_url(Path(place))))
    adapter_id = ledger.adapter_id("translate")
    versions = ledger.versions("translate")
    won = 0
    for turn in range(commands):
        kind = turn % 4
        if kind == 0:
            ledger.submit(NewJob("merge", f"{number}-{turn}", "its own", {}, "ada"))
        elif kind == 1:
            ledger.submit(NewJob("eval", f"shared-{turn}", "everybody's", {}, "ada"))
        elif kind == 2:
            job = ledger.claim(f"process {number}", 60)
            if job is not None:
                ledger.renew(job.id, job.attempt, 60)
                assert ledger.finish(job.id, job.attempt, JobState.SUCCEEDED, result={"by": number})
        else:
            holder = ledger.stage_holder(adapter_id, "production")
            target = versions[0].id if holder != versions[0].id else versions[1].id
            try:
                ledger.move_stage(
                    adapter_id,
                    "production",
                    version_id=target,
                    expected=holder,
                    action="promote",
                    actor=str(number),
                    reason="",
                )
                won += 1
            except StageMoved:
                pass  # another process was between our look and our write: that is the point
    print(won)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
