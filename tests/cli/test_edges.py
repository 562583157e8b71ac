"""Where the program begins and where its words end: in JSON, in a closed pipe, on a full disk, with Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterctl.registry.domain.errors import Misconfigured
from adapterctl.registry.settings import load_settings

PROGRAM = [sys.executable, "-m", "adapterctl"]
INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from adapterctl.__main__ import main
main()
"""


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *words], stderr=subprocess.PIPE, text=True, timeout=60, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("words", "message", "path"),
    [
        (["-o", "json", "merge"], "Missing argument", "adapterctl merge -h"),
        (["merge", "a", "b", "--made-up", "-o", "json"], "No such option: --made-up", "adapterctl merge -h"),
        (["promot", "--output=json"], "Did you mean 'promote'", "adapterctl -h"),
    ],
)
def test_errors_of_usage_are_objects_where_json_is_asked_for(words: list[str], message: str, path: str):
    done = run(*words, stdout=subprocess.PIPE)

    said = json.loads(done.stderr)
    assert (done.returncode, done.stdout, said["exit_code"]) == (2, "", 2)
    assert message in said["error"]["message"]
    assert (said["error"]["code"], said["error"]["hint"]) == ("invalid_input", path)


@pytest.mark.parametrize("variable", ["ADAPTERCTL_ACTOR", "USER"])
@pytest.mark.parametrize("name", ["ren\udce9", "ada\neve"], ids=["not UTF-8", "two lines"])
def test_who_cannot_be_written_down_is_refused_before_anything_is(home: Path, variable: str, name: str):
    others = {key: value for key, value in os.environ.items() if key != "ADAPTERCTL_ACTOR"}

    done = run("base", "add", "tiny", env=others | {variable: name})

    assert done.returncode == 2
    assert f"actor is {name!r}" in done.stderr
    assert variable in done.stderr
    assert not (home / "registry.db").exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LEASE_S", "-1", "lease_s is -1.0, expected 1 or more"),
        ("LEASE_S", "nan", "lease_s is nan, expected 1 or more"),
        ("JOB_TIMEOUT_S", "0", "job_timeout_s is 0.0, expected 1 or more"),
        ("THREADS", "-5", "threads is -5, expected 0 or more"),
        ("MAX_UPLOAD_MB", "0", "max_upload_mb is 0, expected 1 or more"),
        ("HOME", "~nobody-of-this-name/x", "sets home to '~nobody-of-this-name/x', and nobody knows where that is"),
    ],
)
def test_a_setting_with_which_nothing_works_is_refused(variable: str, value: str, said: str):
    done = run("merge", "a:v1", "b:v1", env=os.environ | {f"ADAPTERCTL_{variable}": value})

    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("own", "env", "goes"),
    [
        ("https://ours", {}, False),
        ("https://ours", {"ADAPTERCTL_TOKEN": "secret"}, False),
        ("https://theirs", {}, True),
        ("https://ours", {"ADAPTERCTL_SERVER": "https://ours"}, True),
        (None, {"ADAPTERCTL_TOKEN": "secret"}, True),
        (None, {}, False),
    ],
)
@pytest.mark.parametrize("decoy", [False, True])
def test_a_projects_file_does_not_have_a_token_sent_to_another_server(
    tmp_path: Path, own: str | None, env: dict[str, str], goes: bool, decoy: bool
):
    user_file = tmp_path / "config.toml"
    user_file.write_text(
        'token = "secret"\n' * ("ADAPTERCTL_TOKEN" not in env) + (f'server = "{own}"\n' if own else "")
    )
    more = 'token = "known"\n' if decoy and "ADAPTERCTL_TOKEN" in env else ""  # what the environment says, wins
    (tmp_path / "adapterctl.toml").write_text(f'server = "https://theirs"\n{more}')

    if goes:
        settings = load_settings(env=env, cwd=tmp_path, user_file=user_file)
        assert (settings.token, settings.server) == ("secret", env.get("ADAPTERCTL_SERVER", "https://theirs"))
    else:
        with pytest.raises(
            Misconfigured, match=f"adapterctl.toml leads to the server https://theirs, .* {own or 'no'}"
        ):
            load_settings(env=env, cwd=tmp_path, user_file=user_file)


def test_a_token_that_comes_with_its_server_goes_there(tmp_path: Path):
    (tmp_path / "config.toml").write_text('token = "secret"\nserver = "https://ours"\n')
    (tmp_path / "adapterctl.toml").write_text('token = "theirs"\nserver = "https://theirs"\n')

    settings = load_settings(env={}, cwd=tmp_path, user_file=tmp_path / "config.toml")

    assert (settings.server, settings.token) == ("https://theirs", "theirs")


def test_a_user_whom_the_machine_does_not_know_has_to_say_where_the_registry_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)

    assert load_settings({"home": home}).home == home
    with pytest.raises(Misconfigured, match=r"home to .~/\.adapterctl., and nobody knows where that is"):
        load_settings(env={})


@pytest.mark.parametrize("words", [["--version"], ["methods"]])
def test_a_full_disk_under_the_output_is_told(words: list[str]):
    with open("/dev/full", "w") as full:
        done = run(*words, stdout=full)

    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_closed_output_is_no_error():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m adapterctl methods -o json >&-"], stderr=subprocess.PIPE, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_before_anything_is_loaded_says_nothing():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (-2, "", "")
