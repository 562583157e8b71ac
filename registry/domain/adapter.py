"""What an adapter is, read from `adapter_config.json` and the safetensors header alone: its modules and their scaling.

`AdapterFacts` is all that a preflight, a plan or a table needs to know; it is stored with the version, so that none of
them opens a weights file again. Nothing here reads a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ModuleKind = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: `begin` and `end` are absolute byte offsets in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module; its delta is `scaling * B @ A`, and `scaling * bias` on the output where lora_bias is used.

    `name` is the module's path in the base (without `base_model.model.`). `a` has shape (rank, d_in...), `b` has
    (d_out, rank, 1...); for an embedding `a` is (rank, vocabulary) and `b` is (width, rank).
    """

    name: str
    kind: ModuleKind
    rank: int
    scaling: float
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None = None

    @property
    def d_in(self) -> int:
        """Columns of A when every axis after the rank is flattened."""
        size = 1
        for n in self.a.shape[1:]:
            size *= n
        return size

    @property
    def d_out(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the files of one adapter say. `modules` is sorted by name; `config` is the JSON as it was read."""

    modules: tuple[LoraModule, ...]
    base_name: str
    base_revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def max_rank(self) -> int:
        return max(m.rank for m in self.modules)

    @property
    def parameters(self) -> int:
        return sum(m.rank * (m.d_in + m.d_out) for m in self.modules)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Safetensors dtype names in use, sorted."""
        return tuple(sorted({t.dtype for m in self.modules for t in (m.a, m.b, m.bias) if t is not None}))

    @property
    def scaling(self) -> dict[str, float]:
        return {m.name: m.scaling for m in self.modules}
