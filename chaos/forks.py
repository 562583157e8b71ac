"""Processes of a contest: forked from one that has imported everything, for MLflow takes two seconds to import.

Whoever forks has no database open and no thread running; each process opens the registry for itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# forked with everything that a registry needs
import adapterctl.bootstrap
import adapterctl.registry.rest.client
import adapterctl.registry.stores.mlflow_versions
import adapterctl.workers.receipt
import adapterctl.workers.supervisor
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.settings import Settings


class Silent:
    """A doorbell that starts nothing: each contest says itself who works."""

    def ring(self, job_id: str) -> None:
        return

    def check(self) -> None:
        return


class Fork:
    """A process that runs `function`, and what it returned (anything that JSON can carry)."""

    def __init__(self, function: Callable[[], Any]) -> None:
        handle, name = tempfile.mkstemp(prefix="fork-")
        os.close(handle)
        self._answer = Path(name)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(function)

    def wait(self) -> Any:
        """Its answer; None where it was killed. Raises where it failed."""
        status = os.waitpid(self.pid, 0)[1]
        text = self._answer.read_text(encoding="utf-8")
        self._answer.unlink()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        if status != 0:
            raise RuntimeError(text or f"a process of the contest ended with {status}")
        return json.loads(text)

    def _be(self, function: Callable[[], Any]) -> None:
        code = 1
        try:
            self._answer.write_text(json.dumps(function()), encoding="utf-8")
            code = 0
        except BaseException:  # noqa: BLE001  the edge of this process: its parent tells
            self._answer.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(code)


def in_child(function: Callable[[], Any]) -> Any:
    return Fork(function).wait()


def all_of(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run them at once."""
    return [fork.wait() for fork in [Fork(function) for function in functions]]


def open_quietly(settings: Settings) -> LocalRegistry:
    registry = adapterctl.bootstrap.connect(settings)
    registry.bell = Silent()
    return registry
