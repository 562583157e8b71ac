"""The header of a safetensors file is read without trusting a byte of it."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import header_bytes, safetensors_bytes

from adapterctl.registry.domain.errors import InvalidAdapter, NotFound
from adapterctl.registry.domain.header import MAX_HEADER_BYTES, MAX_TENSORS, parse_header, read_header

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file_of(header: Any, body: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return header_bytes(text) + body


def code_of(data: bytes, size: int | None = None) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        parse_header(data, len(data) if size is None else size)
    assert caught.value.message
    return caught.value.problems[0].code


def test_offsets_are_absolute_and_tensors_come_in_file_order(tmp_path):
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes({"b": ("F32", first), "a": ("F16", second)}, {"format": "pt"}))

    header = read_header(path)

    data = path.read_bytes()
    assert [t.key for t in header.tensors] == ["b", "a"]
    assert header.metadata == {"format": "pt"}
    assert data[header.tensors[0].begin : header.tensors[0].end] == first.tobytes()
    assert data[header.tensors[1].begin : header.tensors[1].end] == second.tobytes()
    assert header.tensors[0].shape == (2, 3)


def test_our_parser_agrees_with_the_safetensors_library(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    tensors = {"x.lora_A.weight": np.ones((3, 2), np.float32), "y": np.zeros((5,), np.float16)}
    numpy_files.save_file(tensors, tmp_path / "w.safetensors", metadata={"a": "b"})

    header = read_header(tmp_path / "w.safetensors")

    assert {t.key: t.shape for t in header.tensors} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"{", "bad_json"),
        (b"{}" + b"\xff", "bad_json"),
        (b"{" * 100_000, "bad_json"),
        (b'{"a": ' + b"[" * 200_000, "bad_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad_json"),
        (b'{"a": NaN}', "bad_json"),
        (b'{"a": 1e999}', "bad_json"),
        (b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}', "duplicate_key"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2,2],"data_offsets":[0,16]}}', "duplicate_key"),
        ({"a": 1}, "bad_header"),
        ({"a": {**F32, "more": 1}}, "bad_header"),
        ({"__metadata__": {"a": 1}, "a": F32}, "bad_header"),
        ({"__metadata__": [], "a": F32}, "bad_header"),
        ({"__metadata__": {"a": "x" * 2_000_000}, "a": F32}, "header_too_large"),
        ({"../a": F32}, "bad_tensor_name"),
        ({"a\0": F32}, "bad_tensor_name"),
        ({"a\u202eb": F32}, "bad_tensor_name"),
        ({"": F32}, "bad_tensor_name"),
        ({"a" * 2000: F32}, "bad_tensor_name"),
        ({"a": {**F32, "dtype": "F33"}}, "bad_dtype"),
        ({"a": {**F32, "dtype": ["F32"]}}, "bad_dtype"),
        ({"a": {**F32, "shape": [0, 4]}}, "bad_shape"),
        ({"a": {**F32, "shape": [-2, -2]}}, "bad_shape"),
        ({"a": {**F32, "shape": [2.0, 2]}}, "bad_shape"),
        ({"a": {**F32, "shape": [True, 4]}}, "bad_shape"),
        ({"a": {**F32, "shape": [2**63, 2**63]}}, "bad_shape"),
        ({"a": {**F32, "shape": [1] * 9}}, "bad_shape"),
        ({"a": {**F32, "shape": "22"}}, "bad_shape"),
        ({"a": {**F32, "data_offsets": [16, 0]}}, "bad_offsets"),
        ({"a": {**F32, "data_offsets": [0, 2**64]}}, "bad_offsets"),
        ({"a": {**F32, "data_offsets": [-16, 0]}}, "bad_offsets"),
        ({"a": {**F32, "data_offsets": [0, 8]}}, "bad_offsets"),
        ({"a": {**F32, "data_offsets": [0, 8, 16]}}, "bad_offsets"),
        ({"a": {**F32, "shape": [2, 1], "data_offsets": [8, 16]}}, "bad_offsets"),
        ({"a": {**F32, "shape": [2, 1], "data_offsets": [0, 8]}}, "bad_offsets"),
        ({"a": F32, "b": F32}, "bad_offsets"),
        ({}, "bad_offsets"),
        ([1, 2], "not_safetensors"),
    ],
)
def test_a_header_that_is_not_exact_is_refused(header, code):
    data = file_of(header)

    assert code_of(data) == code


def test_ten_thousand_broken_headers_are_read_or_refused_at_once():
    """Bytes flipped, cut out, doubled, and tokens of JSON put in, over a header of PEFT's kind; seeded."""
    chance = random.Random(0)
    tensors = {
        f"base_model.model.l{i}.lora_{side}.weight": ("F32", np.ones((2, 2), np.float32))
        for i in range(2)
        for side in "AB"
    }
    whole = safetensors_bytes(tensors, {"format": "pt"})
    tokens = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"-1",
        b"1e999",
        b"null",
        b"\xff",
        b"0" * 40,
        b'"dtype"',
        b"__metadata__",
    ]
    read, slowest, codes = 0, 0.0, set()
    for _ in range(10_000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data)) if chance.random() < 0.9 else chance.randrange(8)
            length = chance.randint(1, 30)
            match chance.randrange(5):
                case 0:
                    data[place] ^= 1 << chance.randrange(8)
                case 1 if len(data) > length + 16:
                    del data[place : place + length]
                case 2:
                    data[place:place] = data[place : place + length]
                case 3:
                    data[place:place] = chance.choice(tokens)
                case _:
                    data[place : place + 1] = bytes([chance.randrange(256)])
        began = time.perf_counter()
        try:
            parse_header(bytes(data), len(data))
            read += 1
        except InvalidAdapter as refusal:
            codes.add(refusal.problems[0].code)
        slowest = max(slowest, time.perf_counter() - began)

    assert 0 < read < 5_000, "flips in values leave a header that can be read, all else must not"
    assert codes >= {"bad_json", "bad_tensor_name", "bad_dtype", "bad_shape", "bad_offsets", "truncated"}
    assert slowest < 1.0


def test_a_file_that_ends_early_is_called_truncated():
    data = safetensors_bytes({"a": ("F32", np.ones((200, 200), np.float32))})

    assert code_of(data[: len(data) // 2]) == "truncated"
    assert code_of(data[:-1]) == "truncated"
    assert code_of(data[:30]) == "truncated"
    assert code_of(data[:5]) == "truncated"
    assert code_of(b"") == "truncated"


def test_a_header_bomb_is_refused_by_its_length_alone():
    assert code_of(header_bytes(b"{}", length=MAX_HEADER_BYTES + 1)) == "header_too_large"
    assert code_of(header_bytes(b"{}", length=2**64 - 1)) == "header_too_large"


def test_too_many_tensors_are_refused():
    one = '"t%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = ("{" + ",".join(one % i for i in range(MAX_TENSORS + 1)) + "}").encode()

    assert code_of(file_of(header)) == "too_many_tensors"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "pickle"),
        (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.", "pickle"),
        (b"PK\x03\x04" + bytes(60), "archive"),
        (b"\x1f\x8b\x08" + bytes(60), "archive"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "not_safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "not_safetensors"),
    ],
)
def test_a_file_under_a_false_name_is_called_what_it_is(data, code):
    assert code_of(data) == code


def test_links_pipes_and_folders_are_refused_without_waiting(tmp_path):
    (tmp_path / "real").write_bytes(safetensors_bytes({"a": ("F32", np.ones(1, np.float32))}))
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")

    for name in ("link", "pipe", "."):
        with pytest.raises(InvalidAdapter) as caught:
            read_header(tmp_path / name)
        assert caught.value.problems[0].code == "not_a_file"


def test_a_missing_file_is_not_found(tmp_path: Path):
    with pytest.raises(NotFound):
        read_header(tmp_path / "none.safetensors")
