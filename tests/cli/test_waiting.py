"""Waiting can be left: Ctrl-C says how to come back, and the work goes on. Real processes on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterctl.cli import follow
from adapterctl.registry.stores.spawn_bell import only_one

PROGRAM = [sys.executable, "-c", "from adapterctl.cli.main import main; main()"]


class Terminal:
    """A command in a pseudo-terminal: what it shows, and keys pressed on it."""

    def __init__(self, *words: str) -> None:
        self.shown = ""
        self._screen, inner = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [*PROGRAM, *words], stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)

    def until(self, text: str, timeout_s: float = 60) -> None:
        """Read until `text` is on the screen."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} did not appear:\n{self.shown}"
            self._read()

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        return self.process.wait()

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def _read(self) -> bool:
        ready, _, _ = select.select([self._screen], [], [], 0.5)
        try:
            piece = os.read(self._screen, 4096) if ready else b""
        except OSError:  # Linux: the other side is closed
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece) or self.process.poll() is None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_ctrl_c_leaves_the_merge_to_itself(terminal: Callable[..., Terminal], run: Callable[..., Any], pair: Path):
    screen = terminal("merge", "translate", "chat")
    screen.until("→ translate-chat, cat")
    time.sleep(0.1)
    screen.process.send_signal(signal.SIGINT)

    code = screen.end()

    (job,) = run("jobs", "ls", "-q").stdout.split()
    if code == 130:  # 0 where the merge was faster than the key
        assert f"adapterctl jobs wait {job}" in screen.shown
        assert "Traceback" not in screen.shown
    assert run("jobs", "wait", job, "-o", "json").data[0]["state"] == "succeeded"
    assert run("ls", "translate-chat", "-q").stdout == "translate-chat:v1\n"


def test_a_question_is_asked_on_a_terminal(terminal: Callable[..., Terminal], run: Callable[..., Any], pair: Path):
    no = terminal("rm", "translate:v1")
    no.until("[y/N]")
    no.type("n\r")
    assert no.end() == 1
    assert run("ls", "-q").stdout.split() == ["chat", "translate"]

    yes = terminal("rm", "translate:v1")
    yes.until("[y/N]")
    yes.type("y\r")
    assert yes.end() == 0
    assert run("ls", "-q").stdout.split() == ["chat"]


def test_a_closed_pipe_ends_quietly(pair: Path):
    listing = subprocess.Popen([*PROGRAM, "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.close()

    code = listing.wait()

    assert code in (0, 1)
    assert b"Traceback" not in listing.stderr.read()
    listing.stderr.close()


def test_who_waits_for_a_job_that_nobody_takes_is_told(
    run: Callable[..., Any], pair: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    with only_one(home) as held, monkeypatch.context() as soon:  # as if one were at work that does not get to it
        assert held
        soon.setattr(follow, "QUEUED_S", 0.3)
        stuck = run("merge", "translate", "chat", "--timeout", "3", code=8)
    (job,) = run("jobs", "ls", "-q").stdout.split()
    taken = run("jobs", "wait", job)

    assert "is queued for" not in taken.stderr
    assert stuck.stderr.count(f"job {job} is queued for 0.3 s now: `adapterctl jobs ls --state live`") == 1
