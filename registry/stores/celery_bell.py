"""The doorbell of a shared registry: a message on a Celery queue that holds a job's id and nothing else.

The job is a committed row before anyone rings, and idle workers are told again of rows that nobody took. So a message
may be lost, doubled or forged, and a broker may be away or be emptied: the job is late at the worst.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..domain.errors import Unavailable
from ..domain.worker import QUEUES, Queue

if TYPE_CHECKING:
    from celery import Celery

WORK = "adapterctl.work"
#: Every key of ours in Redis begins so, which is what the rights of a worker's user are tied to.
KEY_PREFIX = "adapterctl:"
#: What a worker's user may do in Redis, as in `ACL SETUSER` and in a file of users: our keys, no channel, few commands.
WORKER_RIGHTS = (
    f"~{KEY_PREFIX}* resetchannels -@all +auth +hello +ping +select +multi +exec +watch +unwatch +evalsha +script|load"
    " +llen +lpush +rpush +brpop +rpop +lrange +get +set +del +pexpire +expire +exists +time +type"
    " +sadd +srem +smembers +sismember +zadd +zrem +zrange +zrangebyscore +zrevrangebyscore +zscore"
    " +hset +hget +hdel +hexists +hlen"
)
#: How long a submit may wait for a broker, and how long it is spared one that did not answer.
PATIENCE_S, SPARED_S = 0.5, 5.0

_log = logging.getLogger("adapterctl.bell")


class CeleryBell:
    """Rings for the workers that serve the job's queue."""

    def __init__(self, broker_url: str, queue_of: Callable[[str], Queue]) -> None:
        self._broker_url = broker_url
        self._queue_of = queue_of
        self._app: Celery | None = None
        self._silent_until = 0.0

    def ring(self, job_id: str) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            self._publish(job_id)
        except _failures() as error:
            self._silent_until = time.monotonic() + SPARED_S
            _log.warning("the broker did not take job %s, a worker will look for it: %s", job_id, type(error).__name__)

    def check(self) -> None:
        """Raises `Unavailable` unless the broker answers."""
        try:
            with self._opened().connection_for_write() as connection:
                connection.default_channel.client.ping()
        except _failures() as error:
            raise Unavailable(
                f"the broker does not answer ({type(error).__name__})",
                hint="jobs are queued all the same; start Redis, or mend ADAPTERCTL_BROKER_URL",
            ) from error

    def _publish(self, job_id: str) -> None:
        self._opened().send_task(WORK, args=(job_id,), queue=self._queue_of(job_id), retry=False, ignore_result=True)

    def _opened(self) -> Celery:
        if self._app is None:
            self._app = celery_app(
                self._broker_url, max_retries=0, socket_connect_timeout=PATIENCE_S, socket_timeout=2 * PATIENCE_S
            )
        return self._app


def celery_app(broker_url: str, **transport: Any) -> Celery:
    """Celery as both ends use it. JSON alone, no results, no remote control: Redis holds two lists and little else."""
    from celery import Celery  # deferred: 0.3 s, and commands that read ring nobody
    from kombu.entity import Queue as Bell

    app = Celery("adapterctl", broker=broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_queues=[Bell(name, routing_key=name) for name in QUEUES],  # type: ignore[no-untyped-call]
        task_default_queue=QUEUES[0],
        task_create_missing_queues=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"global_keyprefix": KEY_PREFIX, "priority_steps": [0], **transport},
        # Acknowledged before the work begins: whoever is killed at work is found by the lease of its job. With late
        # acknowledgement Redis would deliver a job that takes long a second time (docs/jobs.md).
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_enable_prefetch_count_reduction=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_proc_alive_timeout=120.0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def _failures() -> tuple[type[Exception], ...]:
    from kombu.exceptions import KombuError  # deferred: as Celery itself
    from redis.exceptions import RedisError

    return KombuError, RedisError, OSError
