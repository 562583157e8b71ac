"""Carries out a merge plan, module by module, from the parents' files to the files of the child.

Needs no base model, no GPU and no torch. Memory holds one module a thread, whatever the number of modules; the bytes
written do not depend on the number of threads, for each module is computed by one thread with a single-threaded BLAS.
Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md` into the folder it is given and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..registry.domain.errors import JobCancelled, Refused
from ..registry.domain.plan import MergePlan, ModulePlan, header_metadata, output_tensors
from ..registry.domain.recipe import RESIZE
from ..registry.merging.blas import keep_freed_memory, one_thread
from ..registry.merging.grams import Factors
from ..registry.merging.make import Outcome, arithmetic, make, promise, wider
from ..registry.merging.method import MethodSpec, find_method
from ..registry.merging.stack import blocks_of, coefficients, load_stack
from ..registry.merging.tensors import STORED, TensorReader, TensorWriter, Written, encode, place, sync_folder, widen

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
Stop = Callable[[], bool]


def never() -> bool:
    """The answer of a caller that never stops a merge."""
    return False


def silent(done: int, total: int) -> None:
    """The progress report of a caller that wants none."""


def merge(
    plan: MergePlan,
    parent_files: Sequence[Path],
    out_dir: Path,
    *,
    threads: int = 1,
    on_progress: Progress = silent,
    should_stop: Stop = never,
) -> dict[str, Outcome]:
    """Write the child's three files into `out_dir`; return what was promised for each module.

    Args:
        parent_files: the weights file of each parent, in the recipe's order; checked by the caller.
        on_progress: called with (modules done, modules in all), in this thread.
        should_stop: asked between modules; when it says yes, no weights file is left and `JobCancelled` is raised.

    Raises `Unavailable` when the disk is full, `Corrupt` when a parent's file ends too early.
    """
    method = method_of(plan)
    with ExitStack() as files:
        readers = [files.enter_context(TensorReader(path)) for path in parent_files]
        writer = files.enter_context(TensorWriter(out_dir / WEIGHTS_FILE, output_tensors(plan), header_metadata(plan)))

        def work(module: ModulePlan) -> Outcome:
            return merge_module(module, method, plan, readers, writer)

        outcomes = for_each_module(plan, work, threads=threads, on_progress=on_progress, should_stop=should_stop)
    _write_text(out_dir / CONFIG_FILE, json.dumps(dict(plan.config), indent=2, sort_keys=True) + "\n")
    _write_text(out_dir / README_FILE, readme(plan))
    sync_folder(out_dir)
    return outcomes


def predict_loss(
    plan: MergePlan, parent_files: Sequence[Path], *, threads: int = 1, should_stop: Stop = never
) -> float:
    """||made - exact sum|| / ||exact sum|| over all modules before rounding, from Gram matrices; writes nothing."""
    method = method_of(plan)
    if method.form == "factors":
        return 0.0
    with ExitStack() as files:
        readers = [files.enter_context(TensorReader(path)) for path in parent_files]

        def work(module: ModulePlan) -> tuple[float, float]:
            stack = load_stack(module.parts, readers, arithmetic(method, plan.recipe.dtype))
            return promise(module, method, stack, plan.recipe)

        pairs = for_each_module(plan, work, threads=threads, should_stop=should_stop).values()
    error, norm = (math.fsum(pair[side] for pair in pairs) for side in (0, 1))
    return math.sqrt(error / norm) if norm > 0 else 0.0


def method_of(plan: MergePlan) -> MethodSpec:
    """The method of the plan's recipe. Raises `Refused` when ours gives another output than the one it names."""
    method, revision = find_method(plan.recipe.method), plan.recipe.method_rev
    if method.rev != revision:
        raise Refused(
            f"the recipe names revision {revision} of {method.name}, this adapterctl has revision {method.rev}",
            hint="merge again, or run the recipe with the adapterctl that made it (`fingerprint` in its receipt)",
        )
    return method


def merge_module(
    module: ModulePlan, method: MethodSpec, plan: MergePlan, readers: Sequence[TensorReader], writer: TensorWriter
) -> Outcome:
    """Merge one module and write its tensors; safe in any thread, as readers and writer are."""
    if method.form == "factors":
        factors = method.function(coefficients(module.parts))
        outcome = Outcome(0.0, 0.0, written=_write_factors(module, factors, plan, readers, writer))
    else:
        stack = load_stack(module.parts, readers, arithmetic(method, plan.recipe.dtype))
        made = make(module, method, stack, plan.recipe)
        outcome = replace(made.outcome, written=_write_made(module, made.a, made.b, plan, writer))
    if not module.bias_key:
        return outcome
    bias = writer.write(module.bias_key, encode(_bias(module, readers), plan.recipe.dtype))
    return replace(outcome, written=(*outcome.written, bias))


def for_each_module(
    plan: MergePlan,
    work: Callable[[ModulePlan], Result],
    *,
    threads: int = 1,
    on_progress: Progress = silent,
    should_stop: Stop = never,
) -> dict[str, Result]:
    """Results by module name, in the plan's order, computed by `threads` threads that each use one BLAS thread.

    The largest modules begin first, so that no thread is left with a large one when the others have nothing left.
    """
    keep_freed_memory()
    results: dict[str, Result] = {}
    with one_thread():
        for done, (name, result) in enumerate(_as_they_come(_largest_first(plan.modules), work, threads), start=1):
            results[name] = result
            on_progress(done, len(plan.modules))
            if done < len(plan.modules) and should_stop():
                raise JobCancelled(
                    f"stopped after {done} of {len(plan.modules)} modules",
                    hint="`adapterctl jobs retry` runs it again",
                )
    return {module.name: results[module.name] for module in plan.modules}


def readme(plan: MergePlan) -> str:
    """A model card that says what the recipe says; the same recipe gives the same text."""
    recipe = plan.recipe
    base = json.dumps(plan.config["base_model_name_or_path"], ensure_ascii=False)
    rows = "".join(f"| {i} | {p.weight!r} | `sha256:{p.digest}` |\n" for i, p in enumerate(recipe.parents, start=1))
    options = "".join(f"* {name}: {value}\n" for name, value in sorted(recipe.options.items()))
    title, made = "Merged adapter", f"{len(recipe.parents)} LoRA adapters of one base, merged from their files"
    if recipe.method == RESIZE:
        title, made = "Resized adapter", "A LoRA adapter at a smaller rank, made from its file"
    return f"""---
base_model: {base}
base_model_relation: adapter
library_name: peft
tags:
- adapterctl
- lora
- {RESIZE if recipe.method == RESIZE else "merge"}
---

# {title}

{made} by adapterctl.

* method: `{recipe.method}` (revision {recipe.method_rev})
* rank: {recipe.rank}, dtype: {recipe.dtype}
* recipe: `sha256:{recipe.digest}`
{options}
| parent | weight | content digest |
|---|---|---|
{rows}
The recipe stands in full in the metadata of `{WEIGHTS_FILE}` under `adapterctl.recipe`.
"""


def _write_factors(
    module: ModulePlan, factors: Factors, plan: MergePlan, readers: Sequence[TensorReader], writer: TensorWriter
) -> tuple[Written, ...]:
    """Scale each parent's factors into their rows and columns; what has scale 1 and the right type moves as bytes."""
    dtype, rank = plan.recipe.dtype, plan.recipe.rank
    d_out, d_in = module.delta_shape
    rows = np.empty((rank, d_in), STORED[dtype])
    columns = np.empty((d_out, rank), STORED[dtype])
    for part, block in zip(module.parts, blocks_of(module.parts), strict=True):
        reader, own = readers[part.parent], slice(block.start, block.stop)
        stored = reader.stored(part.a, (part.rank, -1))
        _scale(stored, part.a.dtype, factors.a[own, None], dtype, rows[own])
        stored = reader.stored(part.b, (-1, part.rank))
        _scale(stored, part.b.dtype, factors.b[own], dtype, columns[:, own])
    rows[block.stop :] = columns[:, block.stop :] = 0
    return writer.write(module.a_key, rows), writer.write(module.b_key, columns)


def _write_made(
    module: ModulePlan, a: NDArray[np.floating], b: NDArray[np.floating], plan: MergePlan, writer: TensorWriter
) -> tuple[Written, ...]:
    dtype = plan.recipe.dtype
    rank = len(a)
    # rows beyond `rank` stay the zeros that the writer reserved
    rows = writer.write(module.a_key, encode(a, dtype))
    columns = encode(b, dtype)
    if rank < plan.recipe.rank:
        columns = np.pad(columns, ((0, 0), (0, plan.recipe.rank - rank)))
    return rows, writer.write(module.b_key, columns)


def _bias(module: ModulePlan, readers: Sequence[TensorReader]) -> NDArray[np.float64]:
    """The sum of weight * scaling * bias: PEFT scales the bias of lora_B like the rest of its output."""
    total = np.zeros(module.b_shape[0])
    for part in module.parts:
        if part.bias is not None:
            total += part.coefficient * readers[part.parent].read(part.bias).astype(np.float64)
    return total


def _scale(stored: NDArray[Any], dtype: str, scale: NDArray[np.float64], wanted: str, out: NDArray[Any]) -> None:
    """Values times `scale` into `out` as stored in `wanted`: the same bytes where nothing changes."""
    first = float(scale.flat[0])
    if dtype == wanted and (scale == 1).all():
        place(stored, out)
    elif stored.itemsize == 2 and (scale == first).all():
        # every index is in bounds: "clip" alone lets numpy leave out the check, and a copy for it
        np.take(_all_scaled(dtype, first, wanted), stored.view("<u2"), out=out, mode="clip")
    else:
        place(_product(stored, dtype, scale, wanted), out)


@lru_cache(maxsize=64)
def _all_scaled(dtype: str, scale: float, wanted: str) -> NDArray[Any]:
    """All 65,536 values of a 16-bit type times `scale`: to look a product up takes half the time of making it."""
    every = np.arange(1 << 16, dtype="<u2").view(STORED[dtype])
    with np.errstate(all="ignore"):  # not all of them occur
        return _product(every, dtype, np.array(scale), wanted)


def _product(stored: NDArray[Any], dtype: str, scale: NDArray[np.float64], wanted: str) -> NDArray[Any]:
    wide = wider(wanted)
    values = np.empty(stored.shape, wide)
    widen(stored, dtype, values)
    values *= scale.astype(wide)
    return encode(values, wanted)


def _quietly(work: Callable[[ModulePlan], Result], module: ModulePlan) -> Result:
    """Overflow is no warning on stderr here: it becomes a value that is not finite, and the receipt fails."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return work(module)


def _largest_first(modules: Sequence[ModulePlan]) -> list[ModulePlan]:
    """By the elements of the delta, which the dense methods pay for; equals in the plan's order, that of the file."""
    return sorted(modules, key=lambda module: math.prod(module.delta_shape), reverse=True)


def _as_they_come(
    modules: Sequence[ModulePlan], work: Callable[[ModulePlan], Result], threads: int
) -> Iterator[tuple[str, Result]]:
    """Name and result of each module; what was not begun is forgotten as soon as something goes wrong."""
    if threads <= 1:
        yield from ((module.name, _quietly(work, module)) for module in modules)
        return
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="merge")
    try:
        names = {pool.submit(_quietly, work, module): module.name for module in modules}
        yield from ((names[future], future.result()) for future in as_completed(names))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
