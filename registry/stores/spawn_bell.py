"""The doorbell of the embedded registry: starts the one supervisor of this home where none is at work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock

from ..domain.errors import NotAllowed
from ..locks import locked_if_free
from ..settings import Settings

SUPERVISOR = "adapterctl.workers.supervisor"
#: A larger log is put aside before the next supervisor writes to it; what was aside is gone then.
LOG_BYTES = 5 << 20


class SpawnBell:
    """A supervisor has a session of its own, so that neither Ctrl-C nor the end of the command reaches it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started: list[int] = []
        self._forgetting = Lock()

    def ring(self, job_id: str) -> None:
        """Nothing is passed on: the supervisor looks for itself, and looks again after it has left (see `main` there).

        That is also why a held lock is answer enough. The caller has committed its job before it rings, so whoever
        holds the lock now will see it.
        """
        with only_one(self._settings.home) as nobody_at_work:
            if not nobody_at_work:
                return
            # under the lock: of two that ring at once, the second must not put aside what the first has just begun
            _put_aside(self._log)
        self._forget_ended()
        self._started.append(self._spawn())

    def check(self) -> None:
        """Who rings starts whoever hears."""

    def _spawn(self) -> int:
        # Not `subprocess`: its Popen complains when the parent ends first, which here is the rule.
        self._log.parent.mkdir(parents=True, exist_ok=True)
        to_log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.posix_spawn(
            sys.executable,
            # -P: a `yaml.py` in the folder where the command was typed must not stand in for ours
            [sys.executable, "-P", "-m", SUPERVISOR, *self._place()],
            {**os.environ, **self._settings.to_env()},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self._log), to_log, 0o600),
                (os.POSIX_SPAWN_OPEN, 2, str(self._log), to_log, 0o600),
            ],
            setsid=True,
        )

    @property
    def _log(self) -> Path:
        return self._settings.home / "jobs" / "supervisor.log"

    def _place(self) -> list[str]:
        # on the command line, where it wins over whatever its environment and files say of other registries
        return [] if self._settings.database_url else ["--home", str(self._settings.home)]

    def _forget_ended(self) -> None:
        """A long-lived caller must not collect zombies. A server rings from many threads, and each ends once."""
        with self._forgetting:
            for pid in list(self._started):
                with suppress(ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        continue
                self._started.remove(pid)


def _put_aside(log: Path) -> None:
    """Rename a log that has grown too large to `….log.1`. A supervisor that is still leaving goes on writing there."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))


@contextmanager
def only_one(home: Path) -> Iterator[bool]:
    """Hold the supervisor's lock of this home; False, without waiting, where another process holds it."""
    file = home / "locks" / "supervisor.lock"
    with ExitStack() as stack:
        try:
            if not file.parent.is_dir():
                file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(locked_if_free(file))
        except OSError as error:
            raise NotAllowed(f"{file} cannot be written: {error.strerror}", hint="use a home that is yours") from error
        yield lock is not None
