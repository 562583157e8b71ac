"""That a LoRA adapter was made of one of another kind: what `convert` writes into its header, and `show` tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Method = Literal["loha", "lokr"]
METHOD_NAMES: Mapping[Method, str] = {"loha": "LoHa", "lokr": "LoKr"}
#: A convolution's kernel, one number an axis.
Kernel = tuple[int, ...]

#: Where a `Conversion` stands in the metadata of a header.
CONVERTED = "adapterctl.converted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How a LoRA adapter was made of one of another kind; it stands in the header of its weights.

    Args:
        rev: of the conversion, raised when the same files give another output.
        weights, config: SHA-256 of the two files that were read.
        rank: to which it was cut; None where it is exact.
        kernels: of convolutions, as the caller gave them.
    """

    method: Method
    rev: int
    weights: str
    config: str
    dtype: str
    rank: int | None = None
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    v: int = 1
