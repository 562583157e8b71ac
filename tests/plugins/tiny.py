"""Tiny adapters, written by code: no torch, no safetensors library, no download.

`tiny_adapter(folder, ...)` writes a folder such as PEFT saves; tests that cannot take a fixture import
`write_tiny_adapter` from `tiny`. Values come from a seeded generator, so the same call writes the
same bytes. The safetensors writer is a second, naive one on purpose: it checks ours by not sharing its code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

#: Modules of a tiny Llama with two layers: name to (d_out, d_in).
LINEAR: Mapping[str, tuple[int, int]] = {
    f"model.layers.{layer}.self_attn.{name}": shape
    for layer in range(2)
    for name, shape in (("q_proj", (16, 16)), ("v_proj", (8, 16)))
}
_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
_DTYPE_NAMES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


class TinyAdapter(Protocol):
    def __call__(
        self,
        folder: Path,
        *,
        rank: int = 4,
        alpha: float = 8,
        dtype: str = "F32",
        seed: int = 0,
        linear: Mapping[str, tuple[int, int]] = LINEAR,
        embedding: Mapping[str, tuple[int, int]] = {},
        conv: Mapping[str, tuple[int, ...]] = {},
        ranks: Mapping[str, int] = {},
        lora_bias: bool = False,
        adapter_name: str = "",
        config: Mapping[str, Any] = {},
        extra: Mapping[str, np.ndarray] = {},
    ) -> Path: ...


def write_tiny_adapter(
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    dtype: str = "F32",
    seed: int = 0,
    linear: Mapping[str, tuple[int, int]] = LINEAR,
    embedding: Mapping[str, tuple[int, int]] = {},
    conv: Mapping[str, tuple[int, ...]] = {},
    ranks: Mapping[str, int] = {},
    lora_bias: bool = False,
    adapter_name: str = "",
    config: Mapping[str, Any] = {},
    extra: Mapping[str, np.ndarray] = {},
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into `folder` (made if needed), and return it.

    Args:
        rank: rank of every module that `ranks` (module name to rank) does not name; `ranks` also fills rank_pattern.
        dtype: BF16, F16, F32 or F64.
        linear: module name to (d_out, d_in). embedding: to (vocabulary, width). conv: to (d_out, d_in, kernel...).
        lora_bias: also write lora_B.bias of each linear module, and say so in the config.
        adapter_name: put into the keys, as state dicts outside PEFT's own files have it.
        config: fields that replace or join those of adapter_config.json.
        extra: further tensors by their full key.
    """
    random = np.random.default_rng(seed)
    infix = f".{adapter_name}" if adapter_name else ""
    tensors: dict[str, np.ndarray] = {}

    def draw(*shape: int) -> np.ndarray:
        return random.normal(0, 0.1, shape).astype(np.float32)

    for name, (d_out, d_in) in linear.items():
        r = ranks.get(name, rank)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A{infix}.weight"] = draw(r, d_in)
        tensors[f"{key}.lora_B{infix}.weight"] = draw(d_out, r)
        if lora_bias:
            tensors[f"{key}.lora_B{infix}.bias"] = draw(d_out)
    for name, (vocabulary, width) in embedding.items():
        r = ranks.get(name, rank)
        tensors[f"base_model.model.{name}.lora_embedding_A{infix}"] = draw(r, vocabulary)
        tensors[f"base_model.model.{name}.lora_embedding_B{infix}"] = draw(width, r)
    for name, (d_out, d_in, *kernel) in conv.items():
        r = ranks.get(name, rank)
        tensors[f"base_model.model.{name}.lora_A{infix}.weight"] = draw(r, d_in, *kernel)
        tensors[f"base_model.model.{name}.lora_B{infix}.weight"] = draw(d_out, r, *(1 for _ in kernel))

    modules = [*linear, *embedding, *conv]
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny/base",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": dict(ranks),
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
        "lora_bias": lora_bias,
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    stored = {key: (dtype, encode(array, dtype)) for key, array in tensors.items()}
    stored |= {key: (_DTYPE_NAMES[str(array.dtype)], array) for key, array in extra.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(stored))
    return folder


def write_tiny_lycoris(
    folder: Path,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    *,
    method: str = "loha",
    dtype: str = "F32",
    seed: int = 0,
    config: Mapping[str, Any] = {},
    extra: Mapping[str, np.ndarray] = {},
) -> Path:
    """Write a LoHa or LoKr adapter of rank 2; `tensors` by their key below `base_model.model.`; one layer by default.

    `config` and `extra` are those of `write_tiny_adapter`.
    """
    layer = "model.layers.0.self_attn.q_proj."
    usual = {
        "loha": {
            f"{layer}hada_w{n}": shape
            for n, shape in (("1_a", (8, 2)), ("1_b", (2, 6)), ("2_a", (8, 2)), ("2_b", (2, 6)))
        },
        "lokr": {f"{layer}lokr_w1": (2, 3), f"{layer}lokr_w2_a": (4, 2), f"{layer}lokr_w2_b": (2, 5)},
    }[method]
    random = np.random.default_rng(seed)
    stored = {
        f"base_model.model.{key}": (dtype, encode(random.normal(size=shape), dtype))
        for key, shape in (usual if tensors is None else tensors).items()
    }
    stored |= {key: (_DTYPE_NAMES[str(array.dtype)], array) for key, array in extra.items()}
    fields: dict[str, Any] = {
        "peft_type": method.upper(),
        "base_model_name_or_path": "tiny/base",
        "r": 2,
        "alpha": 4,
        "target_modules": ["q_proj"],
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(stored))
    return folder


def encode(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a stored dtype; BF16 (as uint16) is rounded to nearest, ties to even."""
    if dtype != "BF16":
        return array.astype(_DTYPES[dtype])
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def carrying(name: str, source: Path, folder: Path) -> Path:
    """A copy of the adapter in `source` whose tensor names carry an adapter's name, as state dicts have it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    whole = (source / "adapter_model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = {key.replace(".weight", f".{name}.weight"): value for key, value in json.loads(whole[8:end]).items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    return folder


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file of (dtype name, array) by key, in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    body = b""
    for key, (dtype, array) in tensors.items():
        header[key] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + array.nbytes],
        }
        body += array.tobytes()
    return header_bytes(json.dumps(header).encode()) + body


def header_bytes(header: bytes, *, length: int | None = None) -> bytes:
    """The length prefix (of `length`, to lie about it) and the header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.fixture
def tiny_adapter() -> TinyAdapter:
    return write_tiny_adapter
