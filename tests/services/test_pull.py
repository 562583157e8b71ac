"""Pulling: what a server lists is not believed before it was looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterctl.registry.domain.errors import Corrupt
from adapterctl.registry.domain.version import FileRecord
from adapterctl.registry.services.pull import pull


def test_a_new_folder_is_as_open_as_any_other_and_no_thread_meets_another_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "plain").mkdir()
    asked: list[int] = []
    monkeypatch.setattr(os, "umask", asked.append)

    pull("translate:v1", [], tmp_path / "target", lambda record, to: None)

    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert not asked, "reading it means to change it for all threads"


def test_a_link_is_followed_to_the_folder_that_it_leads_to(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "target").symlink_to("real")
    files = [FileRecord("a", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")]

    pull("translate:v1", files, tmp_path / "target", lambda record, to: to.write_bytes(b"{}"))

    assert (tmp_path / "real" / "a").read_bytes() == b"{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "target"]


@pytest.mark.parametrize("path", ["../escaped", "/escaped", "a/../../escaped", "a//b", "", "."])
def test_a_file_outside_the_folder_is_refused_before_anything_is_written(path: str, tmp_path: Path):
    files = [FileRecord("adapter_config.json", 2, "0" * 64), FileRecord(path, 2, "0" * 64)]

    with pytest.raises(Corrupt, match="no file below its folder"):
        pull("translate:v1", files, tmp_path / "target", lambda record, to: to.write_bytes(b"{}"))

    assert list(tmp_path.iterdir()) == []
