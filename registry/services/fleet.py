"""Workers on several machines: which queue a job goes to, and what each worker does for the queue while it is idle.

A broker forgets messages, and workers are killed. So every worker looks after the rows: what the dead held is queued
again, what nobody can take is moved, and what nobody took is rung for again.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..domain.job import JobState
from ..domain.worker import Queue, served
from ..ports import Doorbell, Ledger
from ..settings import Settings


def queue_of(ledger: Ledger, job_id: str) -> Queue:
    """The queue that a job waits in; that of any job where there is none such."""
    job = ledger.job(job_id)
    return job.queue if job is not None else "cpu"


def queue_for_gpu_work(ledger: Ledger, settings: Settings) -> Queue:
    """Where a job that gains from a GPU goes: `prefer` waits for one only where a living worker has it."""
    if settings.gpu_queue == "never":
        return "cpu"
    return "gpu" if settings.gpu_queue == "require" or "gpu" in served(ledger.workers()) else "cpu"


def tend(ledger: Ledger, bell: Doorbell, settings: Settings, *, queues: Sequence[Queue], idle: bool) -> None:
    """Queue again what the dead held, move what no worker can take, and ring for both; called at each beat of a worker.

    Only an idle worker rings for what has been waiting for `ring_again_s`, and for its own queues: it, or another idle
    one, will hear. So messages do not pile up while all are at work, and whoever ends a job looks for the next itself.
    """
    again = [job for job in ledger.reap() if job.state is JobState.QUEUED]
    if settings.gpu_queue == "prefer" and "gpu" not in served(ledger.workers()):
        again += ledger.move_queued("gpu", "cpu")
    if idle:
        again += ledger.waiting(queues, for_s=settings.ring_again_s)
    for job_id in dict.fromkeys(job.id for job in again):
        bell.ring(job_id)
