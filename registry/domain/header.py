"""The header of a safetensors file, read without trusting a byte of it: names, dtypes, shapes and where tensors lie.

Adapters come from strangers. The common reader accepts duplicate keys, zero-size tensors, names with `../` or NUL, and
half a million empty tensors; this one accepts a file only when its tensors cover it exactly, without gap or overlap,
within the limits below. Nothing but the header is read, and every refusal is `InvalidAdapter` with a coded `Problem`.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import InvalidAdapter, NotFound, Problem

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 200_000
MAX_METADATA_CHARACTERS = 1024 * 1024
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 8
MAX_NUMBER = 2**48

#: Bytes of one element. Types of less than a byte are left out: no adapter uses them.
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

_TENSOR_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DOWNLOAD_HINT = "fetch the file again and compare its size with the source"
_CONVERT_HINT = "save the adapter with PEFT's save_pretrained(..., safe_serialization=True)"
#: What files of another kind begin with, so that a file under a false name is called what it is.
_MAGIC = (
    (b"PK\x03\x04", "archive", "a zip archive (PyTorch's .bin and .pt files are such)", _CONVERT_HINT),
    (b"PK\x05\x06", "archive", "an empty zip archive", _CONVERT_HINT),
    (b"\x80\x02", "pickle", "a Python pickle, which can run code when it is loaded", _CONVERT_HINT),
    (b"\x80\x03", "pickle", "a Python pickle, which can run code when it is loaded", _CONVERT_HINT),
    (b"\x80\x04", "pickle", "a Python pickle, which can run code when it is loaded", _CONVERT_HINT),
    (b"\x80\x05", "pickle", "a Python pickle, which can run code when it is loaded", _CONVERT_HINT),
    (b"\x1f\x8b", "archive", "a gzip archive", "unpack it and give the folder"),
    (b"GGUF", "not_safetensors", "a GGUF model", _CONVERT_HINT),
    (b"version https://git-lfs", "not_safetensors", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: `begin` and `end` are absolute byte offsets in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in file order, and the file's free-form metadata."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


class _Refusal(Exception):
    """A reason found inside a JSON hook; it becomes `InvalidAdapter` at the end of the parse."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_header(path: Path) -> Header:
    """Header of the file at `path`. Raises `InvalidAdapter`, or `NotFound` where there is no file."""
    descriptor = open_plain_file(path)
    with os.fdopen(descriptor, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(64)
        if len(prefix) >= 8 and (length := int.from_bytes(prefix[:8], "little")) <= MAX_HEADER_BYTES:
            prefix += file.read(max(0, 8 + length - len(prefix)))
    return parse_header(prefix, file_size)


def parse_header(prefix: bytes, file_size: int) -> Header:
    """Parse the first bytes of a file of `file_size` bytes; `prefix` holds at least the header, or all of the file."""
    body = _header_bytes(prefix, file_size)
    entries = strict_json_object(body, what="header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("bad_header", "__metadata__ of the header is not a mapping of text to text")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_CHARACTERS:
        _refuse("header_too_large", f"__metadata__ holds more than {MAX_METADATA_CHARACTERS:,} characters")
    if len(entries) > MAX_TENSORS:
        _refuse("too_many_tensors", f"the file has {len(entries):,} tensors, at most {MAX_TENSORS:,} are accepted")
    start = 8 + len(body)
    tensors = [_entry(name, value, start) for name, value in entries.items()]
    tensors.sort(key=lambda entry: entry.begin)
    _check_cover(tensors, start, file_size)
    return Header(tuple(tensors), metadata)


def strict_json_object(body: bytes, *, what: str) -> dict[str, Any]:
    """A JSON object with unique keys and finite numbers, from bytes that nobody vouches for."""
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant
        )
    except _Refusal as refusal:
        _refuse(refusal.code, f"the {what} {refusal}")
    except (ValueError, RecursionError) as error:  # also too many digits, and bytes that are not UTF-8
        _refuse("bad_json", f"the {what} is not JSON: {str(error)[:200]}")
    if not isinstance(value, dict):
        _refuse("bad_json", f"the {what} is a JSON {type(value).__name__}, not an object")
    return value


def open_plain_file(path: Path) -> int:
    """A read-only descriptor of a regular file; links, pipes and devices are refused without waiting on them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"{path} is not there", hint="give a folder that holds the adapter's files") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise NotFound(f"{path} cannot be opened: {error.strerror}", hint="check its permissions") from error
        _refuse("not_a_file", f"{path.name} is a symbolic link", "copy the file itself into the folder (cp -L)")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        _refuse("not_a_file", f"{path.name} is not a regular file", "copy the file itself into the folder")
    return descriptor


def _header_bytes(prefix: bytes, file_size: int) -> bytes:
    length = int.from_bytes(prefix[:8], "little")
    if prefix[8:9] != b"{" or length > MAX_HEADER_BYTES:
        _refuse_by_magic(prefix)
    if len(prefix) < 8:
        _refuse("truncated", f"the file has {file_size} bytes, too few for a safetensors header", _DOWNLOAD_HINT)
    if len(prefix) > 8 and prefix[8:9] != b"{":
        _refuse("not_safetensors", "the file is not safetensors: its header does not begin with '{'", _CONVERT_HINT)
    if length > MAX_HEADER_BYTES:
        _refuse(
            "header_too_large",
            f"the file announces a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are accepted",
        )
    if 8 + length > file_size or len(prefix) < 8 + length:
        _refuse("truncated", f"the header needs {8 + length:,} bytes, the file has {file_size:,}", _DOWNLOAD_HINT)
    return prefix[8 : 8 + length]


def _refuse_by_magic(prefix: bytes) -> None:
    for magic, code, kind, hint in _MAGIC:
        if prefix.startswith(magic):
            _refuse(code, f"the file is {kind}, whatever its name says", hint)


def _entry(name: str, value: Any, start: int) -> TensorEntry:
    if not _TENSOR_NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        _refuse(
            "bad_tensor_name",
            f"tensor name {name[:80]!r} is not allowed: letters, digits, '.', '_' and '-', at most {MAX_NAME_LENGTH}",
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse("bad_header", f"{name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse("bad_dtype", f"{name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or 0 in shape:
        _refuse("bad_shape", f"{name} has the shape {str(shape)[:80]}, expected positive integers")
    if not _naturals(offsets) or len(offsets) != 2:
        _refuse("bad_offsets", f"{name} has the data_offsets {str(offsets)[:80]}, expected two places")
    size = DTYPE_BYTES[dtype]
    for n in shape:
        size *= n
    begin, end = offsets
    if end - begin != size:
        _refuse("bad_offsets", f"{name} takes {end - begin} bytes, its shape {shape} and dtype {dtype} need {size}")
    return TensorEntry(name, dtype, tuple(shape), start + begin, start + end)


def _naturals(value: Any) -> bool:
    """Whether this is a list of integers that a file can have; JSON's `true` and `1.0` are none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_NUMBER for n in value)


def _check_cover(tensors: list[TensorEntry], start: int, file_size: int) -> None:
    place = start
    for entry in tensors:
        if entry.begin != place:
            fault = "overlaps the tensor before it" if entry.begin < place else "leaves a gap before it"
            _refuse("bad_offsets", f"{entry.key} {fault}: it begins at byte {entry.begin}, expected {place}")
        place = entry.end
    if place > file_size:
        _refuse("truncated", f"the tensors need {place:,} bytes, the file has {file_size:,}", _DOWNLOAD_HINT)
    if place < file_size:
        _refuse("bad_offsets", f"{file_size - place:,} bytes follow the last tensor, none are expected")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refusal("duplicate_key", f"has the key {key[:80]!r} twice")
            seen.add(key)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refusal("bad_json", f"holds the number {text[:40]}, which is not finite")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _Refusal("bad_json", f"holds {name}, which is not JSON")


def _refuse(code: str, message: str, hint: str = "") -> NoReturn:
    raise InvalidAdapter(message, hint=hint, problems=[Problem(code, message, hint)])
