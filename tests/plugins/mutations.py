"""Files that are nearly right: bytes and headers of a valid safetensors file, changed at random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st
from tiny import header_bytes

TOKENS = [
    b"null", b"true", b"NaN", b"-1", b"1e999", b"[", b"]", b"{", b"}", b'"', b",", b":", b"0", b"99999999999999999999",
    b"F64", b"BF16", b"\xff", b"\x00", b"\\u202e", b"lora_A", b"lora_B", b".bias", b'"dtype":"F32",', b'"shape":[],',
]  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def false_headers(draw: st.DrawFn, valid: bytes, names: Sequence[str]) -> bytes:
    """A valid file whose header is well-formed JSON that says something else about the same bytes."""
    length = int.from_bytes(valid[:8], "little")
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(header) or [""]))
        other = draw(st.sampled_from(sorted(header) or [""]) | st.sampled_from(names))
        change = draw(st.sampled_from(["drop", "rename", "copy", "replace", "field", "number", "body"]))
        if change == "drop":
            header.pop(key, None)
        elif change == "rename":
            header[other] = header.pop(key, {})
        elif change == "copy":
            header[other] = header.get(key, {})
        elif change == "replace":
            header[key] = draw(JSON)
        elif change == "body":
            body = draw(st.binary(max_size=64)) + body[draw(st.integers(0, len(body))) :]
        elif isinstance(header.get(key), dict):
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            numbers = st.lists(st.integers(-1, 200) | st.sampled_from([2**31, 2**63]), max_size=4)
            dtypes = st.sampled_from(["F16", "BF16", "F64", "I8", "F33"])
            header[key] = {**header[key], field: draw(JSON if change == "field" else numbers | dtypes)}
    return header_bytes(json.dumps(header).encode()) + body


@st.composite
def broken_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with bits flipped, cuts, doubled pieces, foreign pieces, a false length."""
    data = bytearray(valid)
    header_end = 8 + int.from_bytes(valid[:8], "little")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, header_end - 1))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "token", "length", "end"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 80))]
        elif kind == "token":
            data[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == "length":
            data[:8] = draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * header_end)).to_bytes(8, "little")
        else:
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def overwrite(path: Path, data: bytes) -> None:
    """Let a file that is there hold these bytes.

    ext4 waits for its disk where a file is emptied to be written anew, a millisecond and more each time
    (https://docs.kernel.org/admin-guide/ext4.html, auto_da_alloc).
    """
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
