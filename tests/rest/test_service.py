"""`make service`, as a process: two adapters are merged through its address, and at the end nothing is left running."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import write_tiny_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folders, which PostgreSQL's user could not enter."""
    folder = Path(tempfile.mkdtemp(prefix="adapterctl-service-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    paths = [str(ROOT / "tests" / "plugins"), os.environ.get("PYTHONPATH", "")]
    # a server that this person is logged in to is none of the service's business
    return {**os.environ, "PYTHONPATH": ":".join(filter(None, paths)), "ADAPTERCTL_SERVER": "http://127.0.0.1:9"}


def test_a_merge_through_a_service_on_this_machine_is_done_by_its_worker(
    folder: Path, environment: dict[str, str], tmp_path: Path
):
    service = subprocess.Popen(
        [sys.executable, str(ROOT / "deploy" / "service.py"), "--folder", str(folder), "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        told = "".join(service.stdout.readline() for _ in range(5))
        secret = re.search(r"actl_\S+", told)[0]
        exports = dict(re.findall(r"export (\w+)=(\S.*)", told))
        assert exports["ADAPTERCTL_TOKEN"] == f'"$(cat {folder / "token"})"'
        commands = environment | {"ADAPTERCTL_SERVER": exports["ADAPTERCTL_SERVER"], "ADAPTERCTL_TOKEN": secret}

        for seed, name in enumerate("ab"):
            adapter = write_tiny_adapter(tmp_path / name, seed=seed)
            _adapterctl(commands, "register", str(adapter), "--name", name)
        merged = _adapterctl(commands, "merge", "a", "b", "--into", "merged")
        (job,) = _adapterctl(commands, "jobs", "ls")
        checks = _adapterctl(commands, "doctor")
        running = _processes_of(folder)
    finally:
        service.terminate()
        code = service.wait(60)
        service.stdout.close()

    assert "merged:v1" in json.dumps(merged)
    assert (job["state"], job["queue"]) == ("succeeded", "cpu")
    assert not [check for check in checks if check["status"] == "error"]
    assert code == 0
    assert f"ADAPTERCTL_MLFLOW_UI={exports['ADAPTERCTL_SERVER']}" in running
    assert {"postgres", "redis-server", "serve", "adapterctl.workers.celery_worker"} <= running
    assert _processes_of(folder) == set()
    for file in ("secrets.json", "token", "users.acl"):
        assert stat.S_IMODE((folder / file).stat().st_mode) == 0o600


def _adapterctl(environment: dict[str, str], *words: str):
    command = [sys.executable, "-P", "-m", "adapterctl", "-o", "json", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _processes_of(folder: Path) -> set[str]:
    """The words of all command lines that name the folder, or whose environment does; Redis shows its port alone."""
    redis_port = json.loads((folder / "secrets.json").read_text())["redis_port"]
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((process / name).read_bytes().decode() for name in ("cmdline", "environ"))
        except OSError:
            continue  # it has ended
        ours = str(folder) in words + environment or f"redis-server 127.0.0.1:{redis_port}" in words
        if ours and "deploy/service.py" not in words:
            found |= {word.rpartition("/")[2] for word in words.replace("\0", " ").split()}
            found |= {each for each in environment.split("\0") if each.startswith("ADAPTERCTL_MLFLOW_UI=")}
    return found
