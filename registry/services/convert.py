"""Write a LoHa or LoKr adapter as LoRA: from its files alone, exactly or cut to a rank, whole or not at all.

A file operation that needs no registry. The result is an ordinary adapter folder; what it was made of stands in the
header of its weights and in its README, so that a version which is registered from it can tell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import Converted, ConvertedModule
from ..domain.adapter import check_dtype
from ..domain.conversion import CONVERTED, METHOD_NAMES, Conversion, Kernel
from ..domain.digest import canonical_json, file_digest
from ..domain.errors import InvalidInput, Refused
from ..domain.header import read_header, strict_json_object
from ..domain.lora_config import MAX_RANK
from ..domain.lycoris import LycorisFacts, read_lycoris
from ..domain.plan import auto_mapping, lora_config, target_modules
from ..wire import to_builtins
from .register import CONFIG_FILE, MAX_BYTES, README_FILE, WEIGHTS_FILE, check_folder, inspect, read_small
from .staging import new_folder

if TYPE_CHECKING:
    from ..merging.lycoris import Outcome

_SMALLER = "cut it, e.g. with --rank 64, and see what that loses"


def convert(
    folder: Path,
    out: Path,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    kernels: Mapping[str, Kernel] | None = None,
) -> Converted:
    """Write the adapter in `folder` as LoRA into `out`, a folder that is new or empty.

    Args:
        rank: to which every module is cut, by the exact truncated SVD; None keeps the exact one.
        dtype: safetensors name; by default F32, which holds every product of two values of 16 bits, or F64 where the
            source has it.
        kernels: of convolutions, by their name or its end, where the file does not tell them.

    Raises `InvalidAdapter` with every problem of the files, `InvalidInput` for options that are none, `Refused` where
    the result would not be registered, `Conflict` and `Unavailable` for `out`. Nothing is left there then.
    """
    # deferred: numpy is for those who read tensors
    from ..merging.blas import one_thread
    from ..merging.lycoris import REVISION, load_parts, lora_tensors, write_module
    from ..merging.tensors import TensorReader, TensorWriter, digest_of, file_size

    check_dtype(dtype)
    check_folder(folder)
    config, path = read_small(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    facts = read_lycoris(strict_json_object(config, what=CONFIG_FILE), read_header(path), kernels)
    with TensorReader(path) as reader, one_thread(), new_folder(out) as staged:
        # read twice, so that memory holds one module: every shape in the header waits for the largest rank
        ranks = {module.name: load_parts(module, facts.method, reader).rank for module in facts.modules}
        r = _rank(ranks, rank)
        conversion = Conversion(
            method=facts.method,
            rev=REVISION,
            weights=file_digest(path),
            config=hashlib.sha256(config).hexdigest(),
            dtype=dtype or ("F64" if "F64" in facts.dtypes else "F32"),
            rank=r if r < max(ranks.values()) else None,
            kernels=dict(kernels or {}),
        )
        metadata = {"format": "pt", CONVERTED: canonical_json(to_builtins(conversion)).decode()}
        tensors = [each for module in facts.modules for each in lora_tensors(module, r, conversion.dtype)]
        _check_size(file_size(tensors, metadata))
        with TensorWriter(staged / WEIGHTS_FILE, tensors, metadata) as writer:
            outcomes = {
                module.name: write_module(module, load_parts(module, facts.method, reader), r, conversion.dtype, writer)
                for module in facts.modules
            }
        text = json.dumps(_config(facts, r), indent=2, sort_keys=True) + "\n"
        (staged / CONFIG_FILE).write_text(text, encoding="utf-8", newline="\n")
        (staged / README_FILE).write_text(_readme(facts, conversion, r), encoding="utf-8", newline="\n")
        written = inspect(staged)  # as register will judge it
        content = digest_of(staged / WEIGHTS_FILE, written)
    return Converted(
        folder=str(out),
        method=facts.method,
        source_rank=facts.r,
        rank=r,
        dtype=conversion.dtype,
        size_bytes=file_size(tensors, metadata),
        loss=_share([math.hypot(each.cut, each.rounding) for each in outcomes.values()], outcomes.values()),
        cut_loss=_share([each.cut for each in outcomes.values()], outcomes.values()),
        weights=conversion.weights,
        config=conversion.config,
        content_digest=content,
        modules=tuple(
            ConvertedModule(name, ranks[name], _share([math.hypot(each.cut, each.rounding)], [each]))
            for name, each in outcomes.items()
        ),
    )


def _rank(ranks: Mapping[str, int], wanted: int | None) -> int:
    """The one rank of the result: the largest that a module needs, or the one that is wanted where that is less."""
    if wanted is not None and wanted < 1:
        raise InvalidInput(f"rank {wanted} is not allowed", hint=f"give a rank from 1 to {MAX_RANK:,}")
    most = max(ranks, key=ranks.__getitem__)
    rank = ranks[most] if wanted is None else min(ranks[most], wanted)
    if rank > MAX_RANK:
        raise Refused(f"{most} has rank {rank:,}, register accepts at most {MAX_RANK:,}", hint=_SMALLER)
    return rank


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_BYTES[WEIGHTS_FILE]:
        raise Refused(
            f"the result would have {size_bytes:,} bytes, register accepts {MAX_BYTES[WEIGHTS_FILE]:,}", hint=_SMALLER
        )


def _share(lost: Sequence[float], outcomes: Iterable[Outcome]) -> float:
    """The norm of all that is lost over that of the exact delta; of nothing, nothing is lost."""
    whole = math.hypot(*(each.norm for each in outcomes))
    return math.hypot(*lost) / whole if whole > 0 else 0.0


def _config(facts: LycorisFacts, rank: int) -> Mapping[str, Any]:
    return lora_config(
        rank=rank,
        base_name=facts.base_name or None,
        base_revision=facts.base_revision,
        target_modules=target_modules([([module.name for module in facts.modules], facts.config)]),
        task_type=facts.task_type,
        auto_mapping=auto_mapping([facts.config]),
    )


def _readme(facts: LycorisFacts, conversion: Conversion, rank: int) -> str:
    """A model card that says what the header says; the same conversion gives the same text."""
    base = f"base_model: {json.dumps(facts.base_name, ensure_ascii=False)}\n" if facts.base_name else ""
    kept = "exact" if conversion.rank is None else "the closest of this rank"
    return f"""---
{base}base_model_relation: adapter
library_name: peft
tags:
- adapterctl
- lora
- {facts.method}
---

# Converted adapter

A {METHOD_NAMES[facts.method]} adapter, written as LoRA from its files by adapterctl.

* method: `{facts.method}` (revision {conversion.rev})
* rank: {rank} ({kept}), dtype: {conversion.dtype}
* its weights: `sha256:{conversion.weights}`
* its config: `sha256:{conversion.config}`

The same stands in the metadata of `{WEIGHTS_FILE}` under `{CONVERTED}`.
"""
