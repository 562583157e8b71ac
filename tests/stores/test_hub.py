"""An adapter from a hub: only its three files, at the commit that a branch means now. The hub is a local server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import write_tiny_adapter

from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.refs import parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CHILD = textwrap.dedent(
    """
    import json, sys
    from adapterctl.registry.domain.errors import AdapterctlError
    from adapterctl.registry.domain.refs import parse_source
    from adapterctl.registry.services.register import MAX_BYTES
    from adapterctl.registry.stores.hub import hub_folder

    try:
        with hub_folder(parse_source(sys.argv[1]), MAX_BYTES) as (folder, source):
            files = {p.name: p.is_symlink() for p in folder.iterdir() if p.is_file()}
            print(json.dumps({"source": str(source), "files": files, "folder": str(folder)}))
    except AdapterctlError as error:
        print(json.dumps({"code": error.code, "message": error.message, "hint": error.hint}))
    """
)


class Hub(BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as the official client asks for one repository, `org/adapter`."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        api, files = "/api/models/org/adapter/revision/", f"/org/adapter/resolve/{COMMIT}/"
        if path in (api + "main", api + COMMIT):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            self.send(200, json.dumps({"id": "org/adapter", "sha": COMMIT, "siblings": siblings}).encode(), body=body)
        elif path.startswith(files) and path.removeprefix(files) in self.files:
            self.send(200, self.files[path.removeprefix(files)], body=body)
        elif path.startswith("/api/models/org/adapter/revision/"):
            self.send(404, b"{}", body=body, error="RevisionNotFound")
        else:
            self.send(404, b"{}", body=body, error="RepoNotFound")

    def send(self, status: int, data: bytes, *, body: bool, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    folder = write_tiny_adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("an adapter\n")
    (folder / "modeling_evil.py").write_text("raise SystemExit\n")
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(source: str, tmp_path: Path, port: int, **env: str) -> dict[str, object]:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.stdout, child.stderr
    answer: dict[str, object] = json.loads(child.stdout)
    return answer


def test_a_branch_is_pinned_and_only_the_files_of_an_adapter_are_fetched(hub, tmp_path):
    answer = fetch("hf://org/adapter@main", tmp_path, hub.server_port)

    assert answer["source"] == f"hf://org/adapter@{COMMIT}"
    assert answer["files"] == {"README.md": False, "adapter_config.json": False, "adapter_model.safetensors": False}
    assert not Path(str(answer["folder"])).exists()
    assert not any("modeling_evil" in path for path in Hub.asked)


def test_an_adapter_in_a_folder_of_a_repository_is_found_and_named(hub, tmp_path):
    Hub.files = {f"fr/chat/{name}": data for name, data in Hub.files.items()}

    answer = fetch("hf://org/adapter/fr/chat@main", tmp_path, hub.server_port)
    elsewhere = fetch("hf://org/adapter@main", tmp_path, hub.server_port)

    assert answer["source"] == f"hf://org/adapter/fr/chat@{COMMIT}"
    assert set(answer["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (elsewhere["code"], elsewhere["hint"]) == ("not_found", "write hf://org/adapter/fr/chat@main")
    with pytest.raises(InvalidInput, match="not a pinned hub repository"):
        parse_source("hf://org/adapter/../other@main")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("hf://org/adapter@nonsense", "not_found"),
        ("hf://org/nothing@main", "not_found"),
        ("hf://org/two--dashes@main", "invalid_input"),
        ("hf://../..@main", "invalid_input"),
    ],
)
def test_what_is_not_there_is_said(hub, tmp_path, source, code):
    assert fetch(source, tmp_path, hub.server_port)["code"] == code


def test_what_the_listing_says_is_too_large_is_not_fetched(hub, tmp_path):
    Hub.files["README.md"] = b" " * (2**20 + 1)

    answer = fetch("hf://org/adapter@main", tmp_path, hub.server_port)

    assert answer["code"] == "invalid_adapter"
    assert "README.md of hf://org/adapter@main has 1,048,577 bytes" in str(answer["message"])
    assert not any("/resolve/" in path for path in Hub.asked)


def test_offline_and_unreachable_say_what_else_can_be_done(tmp_path):
    offline = fetch("hf://org/adapter@main", tmp_path, 9, HF_HUB_OFFLINE="1")
    unreachable = fetch(f"hf://org/adapter@{COMMIT}", tmp_path, 9)

    assert (offline["code"], unreachable["code"]) == ("unavailable", "unavailable")
    assert "register their folder" in str(offline["hint"])
