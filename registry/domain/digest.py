"""Names for content: the digest of an adapter, of a recipe, of a file.

A *content digest* covers what an adapter computes and nothing else: tensors by canonical name, the resolved scaling of
each module, and the orientation flag. Base, file name, header metadata and README are not in it, so the same weights
saved by two tools have one digest. Canonical JSON is RFC 8785 (https://www.rfc-editor.org/rfc/rfc8785).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import rfc8785

_DIGEST = re.compile("[0-9a-f]{64}")


def canonical_json(value: Any) -> bytes:
    """RFC 8785 bytes of `value`; floats must be finite."""
    return rfc8785.dumps(value)


def json_digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    """Whether this is a SHA-256 as all of them are written here: 64 hex digits in lower case."""
    return _DIGEST.fullmatch(text) is not None


def content_digest(
    tensors: Iterable[tuple[str, str, tuple[int, ...], str]],
    *,
    scaling: Mapping[str, float],
    fan_in_fan_out: bool,
) -> str:
    """Digest of what an adapter computes.

    Args:
        tensors: (canonical name, safetensors dtype, shape, sha256 of the tensor's bytes); the canonical name lacks
            the prefix `base_model.model.` and the adapter name `.default`.
        scaling: module name to its resolved float64 scaling (alpha / r or alpha / sqrt(r), patterns applied).
        fan_in_fan_out: whether the base stores its weights as (d_in, d_out).
    """
    return json_digest(
        {
            "v": 1,
            "tensors": [[name, dtype, list(shape), sha] for name, dtype, shape, sha in sorted(tensors)],
            "scale": {module: float(value) for module, value in scaling.items()},
            "fan_in_fan_out": fan_in_fan_out,
        }
    )
