"""The guards around every test do guard."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest


@pytest.mark.parametrize("address", ["192.0.2.1", "example.org"])
def test_a_test_cannot_reach_the_network(address: str):
    with pytest.raises(RuntimeError, match="tests use no network"):
        socket.create_connection((address, 80), timeout=1)


def test_a_test_can_talk_to_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"hello")
        received = server.accept()[0]
        with received:
            assert received.recv(5) == b"hello"


def test_every_test_has_an_empty_home_of_its_own(home: Path):
    assert os.environ["ADAPTERCTL_HOME"] == str(home)
    assert list(home.iterdir()) == []


def test_no_setting_of_the_caller_comes_in():
    ours = {name for name in os.environ if name.startswith(("ADAPTERCTL_", "MLFLOW_"))}

    assert ours == {"ADAPTERCTL_HOME", "MLFLOW_DISABLE_TELEMETRY"}
