"""Where PEFT's `add_weighted_adapter` is wrong, with its error and ours: docs/peft.md.

    python bench/peft_faults.py

Each case is carried out with the installed PEFT on a tiny Llama: the parents are loaded, merged and saved as its documentation
says, and what it saved is loaded on the base again. The yardstick is dense and in float64: what each parent alone makes of
every weight of the base (`merge_and_unload`), times its weight, added up. All values come from numpy's generator, so the
page is the same on every machine.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from adapters import WEIGHTS_FILE, plan
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapterctl.registry.domain.errors import Refused
from adapterctl.registry.domain.header import read_header
from adapterctl.workers import engine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "peft.md"
#: Of a merge that is exact: one rounding to float32.
EXACT = 1e-6
HALVES = (0.5, 0.5)
USUAL = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Fault:
    """What the parents are (over `USUAL`), what PEFT is asked for, and why it goes wrong.

    `same` takes one parent twice; `sizes` is about the bytes that come out, not about their values; `note` goes behind
    what adapterctl does.
    """

    name: str
    cause: str
    parents: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...] = HALVES
    combination: str = "cat"
    same: bool = False
    sizes: bool = False
    dtype: torch.dtype = torch.float32
    note: str = ""

    @property
    def call(self) -> str:
        names = ", ".join(f'"p{i}"' for i in range(len(self.weights)))
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        asked = f', "{self.combination}"' if len(self.weights) > 1 else ""
        return f'add_weighted_adapter([{names}], [{weights}], "m"{asked})'


@dataclass(frozen=True)
class Found:
    """A relative error where the result has one, else what happened; `does` says what adapterctl does instead, and `said`
    holds the warnings of PEFT while it merged.
    """

    theirs: float | str
    ours: float | None
    does: str
    said: tuple[str, ...] = ()


#: Wrong without a word. A parent alone at weight 1 should come back as it is.
SILENT = (
    Fault(
        "`use_rslora` in the first parent",
        "α = r is set for the result and `use_rslora` is inherited, so it is scaled by √r; the weights hold all scaling already",
        ({"use_rslora": True, "r": 8}, {}),
    ),
    Fault(
        "`use_rslora` in all of them",
        "the same √r once more",
        ({"use_rslora": True, "r": 8}, {"use_rslora": True, "r": 8}),
    ),
    Fault(
        "`layers_to_transform` in the first parent",
        "the result inherits the first parent's layers; those of the others are dropped",
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    ),
    Fault(
        "`exclude_modules` in the first parent",
        "the result inherits what the first parent excludes; the others' modules of that name are dropped",
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, {}),
    ),
    Fault(
        "`use_dora`",
        "only A and B are merged; the magnitudes start anew from the base",
        ({"use_dora": True},),
        (1.0,),
    ),
    Fault(
        "`lora_bias`",
        "only the weights of A and B are merged; the biases of B are left out",
        ({"lora_bias": True}, {"lora_bias": True}),
    ),
    Fault(
        "`modules_to_save`",
        "the result gets a fresh copy of the base's module, not the parent's",
        ({"modules_to_save": ["lm_head"]},),
        (1.0,),
    ),
    Fault(
        "`modules_to_save` in the second parent only",
        "the result inherits the first parent's `modules_to_save`, which is none",
        ({}, {"modules_to_save": ["lm_head"]}),
    ),
    Fault(
        "`trainable_token_indices`",
        "the result gets fresh copies of the base's rows, not the parent's",
        ({"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},),
        (1.0,),
    ),
)
#: What is meant so, seen when it is done, or a matter of cost.
SEEN = (
    Fault(
        "`linear`, any two parents",
        "it is defined on the factors: A and B are added apart, so one parent's B meets the other's A",
        ({}, {}),
        combination="linear",
    ),
    Fault(
        "`linear`, one adapter with itself",
        "the same: twice the adapter, instead of the adapter",
        ({},),
        combination="linear",
        same=True,
    ),
    Fault(
        "`rank_pattern` with `linear`",
        "A and B keep their ranks while the config that is saved says another one for all",
        ({"rank_pattern": {"v_proj": 2}}, {"rank_pattern": {"v_proj": 2}}),
        combination="linear",
    ),
    Fault(
        "`svd`, parents of rank 4",
        "cut to the largest rank of a parent unless `svd_rank` is given; nothing tells what that loses",
        ({}, {}),
        combination="svd",
        note="; its own `svd` tells the loss, `plan` tells it for every rank",
    ),
    Fault(
        "`svd`, bfloat16 parents",
        "the deltas are decomposed in float32 and stored like that",
        ({}, {}),
        combination="svd",
        sizes=True,
        dtype=torch.bfloat16,
    ),
    Fault(
        '`bias="all"`',
        "PEFT holds one set of biases of the base, so it loads no second adapter that has some",
        ({"bias": "all"}, {"bias": "all"}),
    ),
)


def main() -> int:
    with tempfile.TemporaryDirectory() as room:
        found = [find(fault, Path(room) / str(place)) for place, fault in enumerate((*SILENT, *SEEN))]
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    return 0


def find(fault: Fault, room: Path) -> Found:
    """Carry one case out with PEFT and with adapterctl."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of while it loads tiny models is no matter of merging
        parents = [_save(parent, room / f"p{place}", fault.dtype, place) for place, parent in enumerate(fault.parents)]
        folders = parents * 2 if fault.same else parents
        exact = summed(folders, fault.weights)
        theirs, said = _theirs(fault, folders, exact, room)
        try:
            ours = _ours(fault, folders, room)
        except Refused as refusal:
            problem = next(each for each in refusal.problems if each.code != "unknown_tensors")
            return Found(theirs, None, f"refuses it, `{problem.code}`: {problem.message}{fault.note}", said)
        if fault.sizes:
            return Found(theirs, None, _sizes(ours, parents[0]) + fault.note, said)
        return Found(theirs, distance(change(ours), exact), f"exact: `sum`{fault.note}", said)


def page(found: Sequence[Found]) -> str:
    lines = [
        f"# Where PEFT {peft.__version__} is wrong",
        "",
        "Written by `python bench/peft_faults.py`; do not edit. Each row was carried out with PEFT itself on a tiny Llama; a test does",
        "it again. An error is ‖what the merged adapter makes of the base − what the parents make of it, weighted and added up‖",
        "relative to the latter, over all weights of the base, dense, in float64. Ours is one rounding to float32 where it is exact.",
        "",
        "## Silently",
        "",
        "Nothing is raised, and `add_weighted_adapter` warns of nothing.",
        "",
        *_table(SILENT, found[: len(SILENT)]),
        "",
        "## As it is defined, not silently, or at a cost",
        "",
        *_table(SEEN, found[len(SILENT) :]),
        "",
        "What adapterctl computes instead, and every reason for which it refuses a parent: [merging.md](merging.md),",
        "[intake.md](intake.md). Sums, `cat` and `svd` of plain adapters are right in PEFT, and are an oracle of our tests.",
        "",
    ]
    return "\n".join(lines)


def _table(faults: Sequence[Fault], found: Sequence[Found]) -> list[str]:
    lines = [
        "| # | parents | PEFT is asked | its error | ours | because | adapterctl |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (fault, row) in enumerate(zip(faults, found, strict=True), start=1):
        lines.append(
            f"| {number} | {fault.name} | `{fault.call}` | {error(row.theirs)} | {error(row.ours)} | {fault.cause} | {row.does} |"
        )
    return lines


def error(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return "< 1e-6" if value < EXACT else f"{value:.0%}"


def _theirs(
    fault: Fault, folders: Sequence[Path], exact: Mapping[str, np.ndarray], room: Path
) -> tuple[float | str, tuple[str, ...]]:
    """The error of what PEFT saves, or what keeps it from being one; and what PEFT warned of while it merged."""
    names = [f"p{place}" for place in range(len(folders))]
    try:
        model = PeftModel.from_pretrained(
            base(fault.dtype if fault.sizes else torch.float64), str(folders[0]), "p0", autocast_adapter_dtype=False
        )
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.add_weighted_adapter(names, list(fault.weights), "m", combination_type=fault.combination)
    except ValueError as refusal:
        return f"ValueError: {str(refusal).partition('.')[0]}", ()
    warned = tuple(str(each.message) for each in said)
    model.save_pretrained(str(room / "peft"), selected_adapters=["m"], save_embedding_layers=False)
    saved = room / "peft" / "m"
    if fault.sizes:
        return _sizes(saved, folders[0]), warned
    try:
        return distance(change(saved), exact), warned
    except RuntimeError as refusal:
        return f"cannot be loaded: {'size mismatch' if 'size mismatch' in str(refusal) else refusal}", warned


def _ours(fault: Fault, folders: Sequence[Path], room: Path) -> Path:
    method, rank = ("svd", USUAL["r"]) if fault.sizes else ("sum", None)
    merge_plan = plan(list(folders), method, rank=rank, weights=fault.weights)
    out = room / "ours"
    out.mkdir()
    engine.merge(merge_plan, [folder / WEIGHTS_FILE for folder in folders], out, threads=1)
    return out


def base(dtype: torch.dtype) -> nn.Module:
    """A Llama of two layers; the same values in every dtype, rounded to it."""
    return copy.deepcopy(_base(dtype))


@cache
def _base(dtype: torch.dtype) -> nn.Module:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_bias=True,
        )
    )
    _fill(model, "", np.random.default_rng(0))
    return model.to(dtype).eval()


def _save(config: Mapping[str, Any], folder: Path, dtype: torch.dtype, seed: int) -> Path:
    """An adapter whose trainable values all differ from where they began, as PEFT saves it."""
    model = get_peft_model(base(torch.float32), LoraConfig(**{**USUAL, **config}))
    _fill(model, "lora_A lora_B modules_to_save trainable_tokens_delta", np.random.default_rng(1 + seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # norms of the base's rows, which must not stay what they are
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    if config.get("bias") == "all":
        _fill(model, "proj.base_layer.bias", np.random.default_rng(1 + seed))
    model.to(dtype).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def _fill(model: nn.Module, parts: str, random: np.random.Generator) -> None:
    """Values of any parameter whose name holds one of `parts`."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parts or any(part in name for part in parts.split()):
                parameter.copy_(torch.from_numpy(0.2 * random.standard_normal(tuple(parameter.shape))))


def change(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter makes of each weight of the base: dense, float64."""
    model = base(torch.float64)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    return {name: after[name].numpy() - before[name] for name in before}


def summed(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, np.ndarray]:
    changes = [change(folder) for folder in folders]
    return {
        name: sum(weight * each[name] for weight, each in zip(weights, changes, strict=True)) for name in changes[0]
    }


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """||one - other|| / ||other|| over all weights."""
    difference = sum(float(np.sum((one[name] - other[name]) ** 2)) for name in other)
    return float(np.sqrt(difference / sum(float(np.sum(values**2)) for values in other.values())))


def _sizes(folder: Path, parent: Path) -> str:
    one, other = (read_header(each / WEIGHTS_FILE).tensors for each in (folder, parent))
    size, usual = (sum(entry.end - entry.begin for entry in tensors) for tensors in (one, other))
    return f"{' and '.join(sorted({entry.dtype for entry in one}))}, {size / usual:g} × the bytes of a parent"


if __name__ == "__main__":
    sys.exit(main())
