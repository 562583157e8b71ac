"""What a base is computed with while adapters are evaluated on it: float32, or weights of fewer bits.

Figures of one are never compared with those of another: the dtype is in the key of a report, and ends the names of its
metrics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import InvalidInput

FULL = "float32"
#: The 4-bit forms that a base is brought into while it is loaded: bitsandbytes' NF4, on which QLoRA trains, and the one
#: with its scales in 8 bits (double quantisation).
FOUR_BITS = ("nf4", "nf4-dq")
#: What may be asked for.
DTYPES = (FULL, *FOUR_BITS)
#: What takes bitsandbytes to compute with, whether it is made while loading or stored so.
BITSANDBYTES = frozenset({*FOUR_BITS, "fp4", "fp4-dq", "int8"})


def check_dtype(dtype: str | None) -> None:
    """Raises `InvalidInput` for what no base can be loaded in; None asks for nothing."""
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(
            f"the base dtype {dtype[:40]!r} is not one of {', '.join(DTYPES)}",
            hint="nf4 is what load_in_4bit with the quant type nf4 gives; leave it out for float32",
        )


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """What the weights beside a model's `config.json` are quantised to; None where they are not.

    Of bitsandbytes `nf4`, `fp4` (with `-dq` where their scales are quantised too) or `int8`; else the method's name.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    if found.get("load_in_4bit"):
        kind = "nf4" if found.get("bnb_4bit_quant_type") == "nf4" else "fp4"
        return f"{kind}-dq" if found.get("bnb_4bit_use_double_quant") else kind
    if found.get("load_in_8bit"):
        return "int8"
    return re.sub(r"[^a-z0-9_-]", "", str(found.get("quant_method", "")).lower())[:20] or "quantised"


def full_first(dtypes: Iterable[str]) -> list[str]:
    """In the order in which figures of several are told, and the first of them counts where none is named."""
    return sorted(dtypes, key=lambda dtype: (dtype != FULL, dtype))


def marked(metric: str, dtype: str) -> str:
    """The name of a metric that was measured on a base in `dtype`."""
    return metric if dtype == FULL else f"{metric}.{dtype}"


def told(dtype: str) -> str:
    """Words behind the title of what is computed on a base in `dtype`."""
    return "" if dtype == FULL else f", base in {dtype}"
