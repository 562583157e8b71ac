"""Who works on jobs beside the embedded supervisor: the workers of a shared registry, and the queues they serve.

Pure. A worker tells the ledger that it is there; how long it was silent is measured by the ledger's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Queue = Literal["cpu", "gpu"]
QUEUES: tuple[Queue, ...] = ("cpu", "gpu")
#: Whether jobs that gain from a GPU wait for a worker that serves `gpu`: only where one is there, always, never.
GpuQueue = Literal["prefer", "require", "never"]
GPU_QUEUE: tuple[GpuQueue, ...] = ("prefer", "require", "never")

#: A worker tells that it is there this often.
BEAT_S = 2.0
#: One that was silent for so long is taken for dead. Its job is not: that goes by the lease.
SILENT_S = 15.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process as the ledger knows it. `draining`: it was told to stop, and takes no more jobs."""

    id: str
    name: str
    host: str
    queues: Sequence[Queue]
    device: str
    started_at: float
    seen_at: float
    draining: bool
    silent_s: float

    @property
    def alive(self) -> bool:
        return self.silent_s < SILENT_S


def served(workers: Iterable[Worker]) -> set[Queue]:
    """The queues that a living worker takes jobs from."""
    return {queue for worker in workers if worker.alive and not worker.draining for queue in worker.queues}
