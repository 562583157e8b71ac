"""Named places where a process may be made to die, so that tests can prove what survives.

    ADAPTERCTL_CRASH_AT=job.claimed              every process that gets there dies there
    ADAPTERCTL_CRASH_ONCE=/some/file             with it: only the first one, which makes this file and then dies

Dying is SIGKILL: no handler runs, no buffer is flushed, no lock is released by us. It is no power cut: what the
operating system was given stays written. Without the variable `reached` costs one look into the environment.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

#: In the order in which a merge passes them; then those of an evaluation, a search, and a move of a stage.
CRASH_POINTS = (
    "submit.committed",  # the job row is there, nobody was told
    "job.claimed",  # attempt and lease are written, nothing was begun
    "job.begun",  # parents are at hand, the stage folder exists, no child yet
    "child.started",  # in the child, before it read anything
    "child.module",  # in the child, between two modules
    "child.written",  # in the child, files complete, result not told
    "child.ended",  # the supervisor holds the result
    "register.locked",  # the lock of the key is held, nothing is in MLflow
    "register.run",  # the run exists
    "register.model",  # the LoggedModel exists, without files
    "register.files",  # the files are in place, the model is not finalized
    "register.finalized",  # the model is ready, no version points at it
    "register.linked",  # run, model and parents are linked, nothing is in the model registry
    "register.version",  # MLflow has the version, the ledger does not
    "ledger.writing",  # inside the transaction that ends the job, before its commit
    "ledger.committed",  # all is recorded, the supervisor was not told
    "eval.task",  # in the child, a task of a suite is in its file, the report of the suite is not
    "eval.taken",  # a report is in the ledger, its file is still there
    "eval.run",  # its run is in MLflow, with nothing in it
    "eval.measured",  # the figures stand on that run, and not yet on the version's
    "eval.logged",  # all of a report is in MLflow, the job has not ended
    "tune.trial",  # in the child, a trial of a search is in its journal
    "tune.run",  # the run of the search is in MLflow, with nothing in it
    "tune.queued",  # a merge of a finalist is queued, the job has not ended
    "stage.writing",  # inside the transaction that moves a stage, before its commit
    "stage.recorded",  # a stage moved in the ledger, nothing did in MLflow
    "stage.legacy",  # MLflow's legacy stages moved too, its alias has not
    "stage.renamed",  # an adapter has another name in the ledger, MLflow's pages have the former one
    "stage.projected",  # the alias moved as well, nobody was told
)


def reached(name: str) -> None:
    """Die here if the environment asks for it."""
    if os.environ.get("ADAPTERCTL_CRASH_AT") != name or not _first():
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _first() -> bool:
    once = os.environ.get("ADAPTERCTL_CRASH_ONCE")
    if not once:
        return True
    try:
        Path(once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
