"""Pulling: what a server lists is not believed before it was looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterctl.registry.domain.errors import Corrupt
from adapterctl.registry.domain.version import FileRecord
from adapterctl.registry.services.pull import pull


@pytest.mark.parametrize("path", ["../escaped", "/escaped", "a/../../escaped", "a//b", "", "."])
def test_a_file_outside_the_folder_is_refused_before_anything_is_written(path: str, tmp_path: Path):
    files = [FileRecord("adapter_config.json", 2, "0" * 64), FileRecord(path, 2, "0" * 64)]

    with pytest.raises(Corrupt, match="no file below its folder"):
        pull("translate:v1", files, tmp_path / "target", lambda record, to: to.write_bytes(b"{}"))

    assert list(tmp_path.iterdir()) == []
