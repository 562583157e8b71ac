"""Writing a safetensors file in pieces: whole or absent, and rounded as IEEE says."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import adapterctl.registry.merging.tensors as tensors_module
from adapterctl.registry.domain.errors import Unavailable
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.merging.tensors import TensorWriter, checksum, encode

TENSORS = [("x", "F32", (3, 4)), ("y", "BF16", (5,)), ("z", "F16", (2, 1, 2))]


@pytest.fixture
def no_space() -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB: the kernel refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_reads_back_with_the_common_library(tmp_path: Path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)

    with TensorWriter(tmp_path / "f.safetensors", TENSORS, {"format": "pt", "b": "2"}) as writer:
        writer.write("y", encode(np.full(5, 1.5), "BF16"))
        writer.write("x", values[1:], offset=16)
        writer.write("x", values[:1])

    loaded = load_file(str(tmp_path / "f.safetensors"))
    assert torch.equal(loaded["x"], torch.from_numpy(values))
    assert loaded["y"].tolist() == [1.5] * 5
    assert loaded["z"].tolist() == [[[0, 0]], [[0, 0]]], "what nobody wrote is zero"
    with safe_open(str(tmp_path / "f.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", "b": "2"}


def test_our_own_reader_accepts_the_layout(tmp_path: Path):
    with TensorWriter(tmp_path / "f.safetensors", TENSORS, {}) as writer:
        expected = list(writer.entries.values())

    assert list(read_header(tmp_path / "f.safetensors").tensors) == expected


def test_many_threads_write_one_file_while_it_goes_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors_module, "WRITEBACK_BYTES", 6000)
    tensors = [(f"t{i}", "F32", (1000,)) for i in range(16)]

    with TensorWriter(tmp_path / "f.safetensors", tensors, {}) as writer:
        threads = [
            threading.Thread(target=writer.write, args=(key, np.full(1000, i, np.float32)))
            for i, (key, _, _) in enumerate(tensors)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    loaded = load_file(str(tmp_path / "f.safetensors"))
    assert all(bool((loaded[f"t{i}"] == i).all()) for i in range(16))


def test_nothing_is_left_when_the_work_fails(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path / "f.safetensors", TENSORS, {}):
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_the_work_and_leaves_nothing(tmp_path: Path, no_space: None):
    with pytest.raises(Unavailable, match="cannot be written"):
        TensorWriter(tmp_path / "f.safetensors", [("x", "F32", (10_000,))], {})

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_a_clean_error(tmp_path: Path):
    with pytest.raises(Unavailable, match="no such file"):
        TensorWriter(tmp_path / "gone" / "f.safetensors", TENSORS, {})


def test_a_tensor_cannot_be_written_over_its_neighbour(tmp_path: Path):
    with TensorWriter(tmp_path / "f.safetensors", TENSORS, {}) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.write("x", np.zeros(12, np.float32), offset=4)


def test_no_descriptor_is_left_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))

    with TensorWriter(tmp_path / "f.safetensors", TENSORS, {}):
        pass
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path / "g.safetensors", TENSORS, {}):
        raise ZeroDivisionError

    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("dtype", "torch_type"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_is_to_nearest_with_ties_to_even_as_in_torch(dtype: str, torch_type: torch.dtype):
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values)]

    with np.errstate(over="ignore"):
        ours = encode(values, dtype).view(np.int16)

    theirs = torch.from_numpy(values).to(torch_type).view(torch.int16).numpy()
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [1, 7, 2047, 2048, 2049, 10_000])
def test_one_changed_byte_anywhere_changes_the_checksum(size: int):
    data = bytearray(np.random.default_rng(size).bytes(size))
    before = checksum(memoryview(data))

    for place in {0, size // 2, size - 1, min(2047, size - 1)}:
        for bit in (1, 128):
            data[place] ^= bit
            assert checksum(memoryview(data)) != before
            data[place] ^= bit
    assert checksum(memoryview(data)) == before
    assert checksum(memoryview(data)[: size - 1]) != before
