"""What this process was told: flag > environment > `adapterctl.toml` of the project > user file > default.

One frozen value without a mode flag: the mode follows from which URLs are set. Read once, at the composition root.
"""

from __future__ import annotations

import os
import pwd
import shlex
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .domain.base_dtype import DTYPES, FULL
from .domain.errors import Misconfigured
from .domain.worker import GPU_QUEUE

PROJECT_FILE = "adapterctl.toml"
#: In the home of an embedded registry.
LEDGER_DATABASE, MLFLOW_DATABASE = "registry.db", "mlflow.db"
#: Below these, every job would lose its lease or its time before it began, or nothing could be sent.
LEAST = {
    "threads": 0,
    "lease_s": 1,
    "idle_s": 0,
    "job_timeout_s": 1,
    "job_memory_mb": 0,
    "ring_again_s": 0,
    "max_upload_mb": 1,
}
#: Settings that lead away from the registry in a home.
ELSEWHERE = ("server", "token", "database_url", "broker_url")


@dataclass(frozen=True, slots=True)
class Settings:
    """`home` holds the embedded registry. `mlflow_uri` is only read when a registry is made.

    `base_paths` says where base models lie, each as NAME=FOLDER; `eval_device` is auto, cpu, cuda or mps; `eval_dtype`
    is what bases are loaded in where an evaluation does not say, unless their files are quantised. With `server` every
    verb goes to another machine; with `database_url` the ledger is shared, and `home` holds what is only ours. What may
    hold a password is left out of `repr`.
    """

    home: Path
    mlflow_uri: str | None = field(default=None, repr=False)
    stages: tuple[str, ...] = ("staging", "production")
    threads: int = 0
    lease_s: float = 15.0
    idle_s: float = 10.0
    job_timeout_s: float = 3600.0
    job_memory_mb: int = 0
    ring_again_s: float = 10.0
    gpu_queue: str = "prefer"
    base_paths: tuple[str, ...] = ()
    eval_device: str = "auto"
    eval_dtype: str = FULL
    actor: str = ""
    mlflow_ui: str = "http://127.0.0.1:5000"
    server: str | None = None
    token: str | None = field(default=None, repr=False)
    database_url: str | None = field(default=None, repr=False)
    broker_url: str | None = field(default=None, repr=False)
    artifacts: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_upload_mb: int = 4096

    def to_env(self) -> dict[str, str]:
        """The environment that gives another process these settings, secrets too: for processes of ours only."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            f"ADAPTERCTL_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
            if value is not None and value != ()
        }


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user_file: Path | None = None,
) -> Settings:
    """Merge the sources. Raises `Misconfigured` naming the file and the key for anything unknown or ill-typed."""
    env = os.environ if env is None else env
    values: dict[str, Any] = {"home": "~/.adapterctl", "actor": _login(env)}
    own = _from_file(user_file or user_config(env))
    project_file = _find_project_file(cwd or Path.cwd())
    project, surroundings = _from_file(project_file), _from_env(env)
    values |= own | project | surroundings
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    if "home" in given:  # who names a folder on the spot means the registry in that folder
        values = {key: value for key, value in values.items() if key not in ELSEWHERE}
    elif "server" in project and "server" not in surroundings and values.get("token") != project.get("token"):
        _check_token_is_for(project["server"], project_file, own, surroundings)
    values |= given
    settings = Settings(**{key: _convert(key, value, "settings") for key, value in values.items()})
    for name, least in LEAST.items():
        if not getattr(settings, name) >= least:  # not a number, for one, is not
            raise Misconfigured(
                f"{name} is {getattr(settings, name)}, expected {least} or more", hint="see docs/settings.md"
            )
    for name, known in (("gpu_queue", GPU_QUEUE), ("eval_dtype", DTYPES)):
        value = getattr(settings, name)
        if value not in known:
            raise Misconfigured(f"{name} is {value!r}, expected {', '.join(known)}", hint="see docs/settings.md")
    # bytes that are not UTF-8 come out of the environment as half characters, which no ledger keeps
    if not settings.actor.isprintable():
        raise Misconfigured(
            f"actor is {settings.actor!r}, expected printable text in UTF-8",
            hint="set ADAPTERCTL_ACTOR to such a name; where it is not set, USER counts",
        )
    return settings


def _check_token_is_for(
    server: str, project_file: Path, own: Mapping[str, Any], surroundings: Mapping[str, str]
) -> None:
    """Raise `Misconfigured` where a project's file would have this person's token sent to a server of its choice.

    The file may have come with a folder of somebody else. A token in the environment is for whatever server is set, as
    in CI, unless this person has another one.
    """
    its = own.get("server")
    if its == server or (its is None and "token" in surroundings):
        return
    raise Misconfigured(
        f"{project_file} leads to the server {server}, and the token is for {its or 'no server'}",
        hint=f"to go there: adapterctl login {shlex.quote(server)}, or set ADAPTERCTL_SERVER and ADAPTERCTL_TOKEN",
    )


def check_address(setting: str, url: str) -> None:
    """Raise `Misconfigured`, without a word of `url`, unless it is certain where the password in it ends.

    What reads an address may cut it at the first '@', at the last one, or at a '/', '?' or '#' before it, and takes the
    rest of the password for a host, which errors name. Source: RFC 3986, section 3.2, where an '@' ends the one
    user information.
    """
    try:
        authority = urlsplit(url).netloc
    except ValueError:  # of a '[', for one, and some of its messages quote what they could not read
        authority = ""
    if "://" not in url or url.count("@") <= min(1, authority.count("@")):
        return
    raise Misconfigured(
        f"{setting} has special characters from which it is not certain where its password ends",
        hint="percent-encode them in user, password and options: %40 for @, %3A for :, %2F for /, %3F for ?, %23 for #,"
        " %5B for [, %25 for %",
    )


def user_config(env: Mapping[str, str] | None = None) -> Path:
    """The file of this person's own settings, whether it is there or not."""
    env = os.environ if env is None else env
    # where nobody knows a home folder "~" stays, which is no file
    config_home = Path(env.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    return config_home / "adapterctl" / "config.toml"


def open_secrets(path: Path) -> list[str]:
    """Settings in a file of settings that may be secrets, where others than its owner may read it; else none.

    Raises `Misconfigured` where the file cannot be read.
    """
    if not path.is_file() or not path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return []
    values = _from_file(path)
    addresses = [key for key in ("database_url", "mlflow_uri", "broker_url") if "@" in str(values.get(key, ""))]
    return [*(["token"] if values.get("token") else []), *addresses]


def _login(env: Mapping[str, str]) -> str:
    """Who is at work, where no setting says: the login name, as `whoami` gives it."""
    try:
        return env.get("USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a number without a name
        return f"uid-{os.getuid()}"


def _find_project_file(folder: Path) -> Path:
    for place in (folder, *folder.parents):
        if os.path.isfile(place / PROJECT_FILE):  # and not `Path.is_file`, which raises in a folder closed to us
            return place / PROJECT_FILE
    return folder / PROJECT_FILE


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:  # not left out: it may say that commands go to a server
        raise Misconfigured(
            f"{path} cannot be read: {error.strerror}", hint="set HOME or XDG_CONFIG_HOME to a folder of yours"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(f"{path} is not valid TOML: {error}", hint="mend or move the file") from error
    return {key: _convert(key, value, str(path)) for key, value in values.items()}


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    known = {f.name for f in fields(Settings)}
    values = {
        key.removeprefix("ADAPTERCTL_").lower(): value
        for key, value in env.items()
        if key.startswith("ADAPTERCTL_") and key.removeprefix("ADAPTERCTL_").lower() in known and value
    }
    if "mlflow_uri" not in values and env.get("MLFLOW_TRACKING_URI"):
        values["mlflow_uri"] = env["MLFLOW_TRACKING_URI"]
    return values


def _convert(key: str, value: Any, origin: str) -> Any:
    """The value as its field's type; a tuple may be written as a list or as comma-separated text."""
    kinds = {f.name: f.type for f in fields(Settings)}
    if key not in kinds:
        raise Misconfigured(f"{origin} sets {key!r}, which is no setting", hint=f"known: {', '.join(sorted(kinds))}")
    kind = str(kinds[key])
    try:
        if kind == "Path":
            return _folder(key, value, origin)
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value)
        if kind.startswith("tuple"):
            return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
        # a token that comes from a file, by way of the environment, has the end of its line
        return None if value is None else str(value).strip() if key == "token" else str(value)
    except (TypeError, ValueError) as error:
        raise Misconfigured(
            f"{origin} sets {key} to {value!r}, expected {kind}", hint="see docs/settings.md"
        ) from error


def _folder(key: str, value: str | Path, origin: str) -> Path:
    """Absolute, without `~`. Raises `Misconfigured` where that is nobody's."""
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:  # no such user, or a user without an entry, as in a container, and no HOME
        raise Misconfigured(
            f"{origin} sets {key} to {str(value)!r}, and nobody knows where that is",
            hint=f"set ADAPTERCTL_{key.upper()} to a whole path",
        ) from error
