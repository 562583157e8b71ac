"""What an adapter is, read from `adapter_config.json` and the safetensors header alone: its modules and their scaling.

`AdapterFacts` is all that a preflight, a plan or a table needs to know; it is stored with the version, so that none of
them opens a weights file again. Nothing here reads a tensor.

PEFT loads a file with too few tensors, or with more than LoRA's own, and changes the base by them without a word.
`read_facts` accepts a file only when every tensor is accounted for: complete pairs, agreeing shapes, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InvalidAdapter, InvalidInput, Problem, raise_all
from .header import Header
from .header import TensorEntry as TensorEntry  # part of a module's facts, so it is found here too
from .lora_config import Findings, LoraConfig, read_config

ModuleKind = Literal["linear", "embedding", "conv"]


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


KEY_PREFIX = "base_model.model."
#: What weights are written in, by its safetensors name, and what torch calls it.
TORCH_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
WEIGHT_DTYPES = tuple(TORCH_DTYPES)
MAX_MODULE_DEPTH = 64
#: Values of `peft_type` that `lycoris.py` reads: kept as the LoRA that they are equal to.
CONVERTIBLE = ("LOHA", "LOKR")

#: What PEFT calls the second of the two modules that it makes of a torch.nn.MultiheadAttention. It adds the delta twice
#: to that module's weight (`MultiheadAttention.merge`, seen in 0.21), so s·B·A is not what was trained.
_OF_ATTENTION = ".base_layer.out_proj"
#: PEFT stores them along where the vocabulary has another size than that of the base (its `EMBEDDING_LAYER_NAMES`).
_WHOLE_EMBEDDINGS = (".embed_tokens.weight", ".lm_head.weight")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?:lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.(?P<what>weight|bias)"
    r"|lora_embedding_(?P<embedding_side>[AB])(?:\.(?P<embedding_name>[^.]+))?)"
)

#: For PEFT's `load_adapter(key_mapping=...)`: names with an adapter's name in them are read as those that PEFT writes.
PLAIN_NAMES: Mapping[str, str] = {
    r"(\.lora_[AB])\.[^.]+(\.weight|\.bias)$": r"\1\2",
    r"(\.lora_embedding_[AB])\.[^.]+$": r"\1",
}

#: The tensors of one module by what they are to it.
Tensors = dict[str, TensorEntry]


def read_facts(config: Mapping[str, Any], header: Header, *, assume_converted: bool = False) -> AdapterFacts:
    """What the two files say together, or `InvalidAdapter` with everything that is wrong with them.

    `assume_converted` vouches that weights trained with pissa, olora, corda, loftq or lora_ga were converted to plain
    LoRA when they were saved.
    """
    if (kind := config.get("peft_type")) in CONVERTIBLE:  # held against LoRA, every field and tensor would be wrong
        hint = "adapterctl convert FOLDER --out DIR writes the same adapter as LoRA, exactly"
        problem = Problem("not_lora", f"peft_type is {kind!r}: only LoRA adapters are kept here", hint)
        raise_all(InvalidAdapter, "the adapter cannot be accepted", [problem])
    findings = Findings()
    found = tensors_by_module(header, findings, read=_slot, unknown=_add_unknown)
    settings = read_config(config, findings, modules=len(found), assume_converted=assume_converted)
    # refused, and by that alone: PEFT multiplies ranks by the number of experts and nests one wrapper in another
    known = [] if config.get("target_parameters") else sorted(found)
    modules = [_module(name, found[name], settings, findings) for name in known]
    raise_all(InvalidAdapter, "the adapter cannot be accepted", findings.problems())
    assert settings is not None  # what could not be read is a finding
    return AdapterFacts(
        modules=tuple(module for module in modules if module is not None),
        base_name=settings.base_name,
        base_revision=settings.base_revision,
        task_type=settings.task_type,
        fan_in_fan_out=settings.fan_in_fan_out,
        config=dict(config),
        metadata=dict(header.metadata),
    )


def canonical_name(key: str) -> str:
    """The name of a tensor in the content digest: without `base_model.model.` and without the adapter's name."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key} is not a LoRA tensor")
    if match["side"]:
        return f"{match['module']}.lora_{match['side']}.{match['what']}"
    return f"{match['module']}.lora_embedding_{match['embedding_side']}"


def carried_name(key: str) -> str | None:
    """The adapter name in a tensor's name, if there is one: PEFT writes none, and loads it under that name alone."""
    match = _KEY.fullmatch(key)
    return (match["name"] or match["embedding_name"]) if match else None


def check_dtype(dtype: str | None) -> None:
    """Raises `InvalidInput` for what weights are not written in; None leaves it open."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise InvalidInput(
            f"dtype {dtype!r} is not one of {', '.join(WEIGHT_DTYPES)}", hint="leave it out, or give one"
        )


def tensors_by_module(
    header: Header,
    findings: Findings,
    *,
    read: Callable[[str], tuple[str, str, str] | None],
    unknown: Callable[[TensorEntry, Findings], None],
) -> dict[str, Tensors]:
    """Every tensor of the file at its module; what does not belong there becomes a finding.

    `read` gives module, what the tensor is to it, and the adapter's name in the key, or None for a key of another kind.
    """
    found: dict[str, Tensors] = {}
    names: set[str] = set()
    for entry in header.tensors:
        place = read(entry.key)
        if place is None or "" in (parts := place[0].split(".")) or len(parts) > MAX_MODULE_DEPTH:
            unknown(entry, findings)
            continue
        if entry.dtype not in WEIGHT_DTYPES:
            expected = ", ".join(WEIGHT_DTYPES)
            findings.add(
                "bad_dtype",
                f"{entry.key} is {entry.dtype}, expected one of {expected}",
                "save it in one of these types",
            )
        name, slot, carried = place
        tensors = found.setdefault(name, {})
        names.add(carried)
        if slot in tensors:
            findings.add("duplicate_tensor", f"{entry.key} and {tensors[slot].key} are the same tensor")
        tensors[slot] = entry
    if len(names) > 1:
        shown = ", ".join(sorted(name or "(none)" for name in names)[:4])
        findings.add("several_adapters", f"keys carry the adapter names {shown}", "save one adapter to one file")
    if not header.tensors:
        findings.add("no_tensors", "the file holds no tensors")
    return found


def _slot(key: str) -> tuple[str, str, str] | None:
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    if match["embedding_side"]:
        return match["module"], f"embedding_{match['embedding_side']}", match["embedding_name"] or ""
    slot = match["side"] if match["what"] == "weight" else f"{match['side']}.bias"
    return match["module"], slot, match["name"] or ""


def _add_unknown(entry: TensorEntry, findings: Findings) -> None:
    hint = "only lora_A, lora_B and lora_embedding tensors are accepted: others would change the base"
    if entry.key.endswith(".base_layer.weight"):
        hint = "PEFT stored the base's own embedding: save with save_pretrained(..., save_embedding_layers=False)"
    elif entry.key.endswith(_WHOLE_EMBEDDINGS):
        hint = "it is a whole embedding: where it is the base's own, save with save_embedding_layers=False"
    elif not entry.key.startswith(KEY_PREFIX):
        hint = f"tensors of PEFT begin with {KEY_PREFIX}: save the adapter with PEFT's save_pretrained"
    elif "lora_magnitude_vector" in entry.key:
        hint = "this is DoRA; train or convert it as plain LoRA"
    elif entry.key.endswith(".lora_velora_embed"):
        hint = "this is VeLoRA's training state: remove these tensors from the file"
    findings.add("unknown_tensors", f"{entry.key} is not a tensor of LoRA", hint)


def _module(name: str, found: Tensors, settings: LoraConfig | None, findings: Findings) -> LoraModule | None:
    """One module, or None with the reason added to `findings`."""
    if name.endswith(_OF_ATTENTION):
        attention = name.removesuffix(_OF_ATTENTION)
        findings.add(
            "multihead_attention",
            f"{attention} is a torch.nn.MultiheadAttention: PEFT adds the delta of its out_proj twice",
            "leave it out of target_modules, or train on a model whose attention is made of linear layers",
        )
        return None
    embedding = {slot.removeprefix("embedding_"): found[slot] for slot in found if slot.startswith("embedding_")}
    if embedding and len(embedding) < len(found):
        findings.add("mixed_kinds", f"{name} has tensors of a linear layer and of an embedding")
        return None
    tensors = embedding or found
    a, b, bias = tensors.get("A"), tensors.get("B"), tensors.get("B.bias")
    if "A.bias" in tensors:
        findings.add("unknown_tensors", f"{tensors['A.bias'].key} is not a tensor of LoRA")
    if a is None or b is None:
        side = "A" if a is None else "B"
        findings.add(f"missing_lora_{side.lower()}", f"{name} has no lora_{side}", "the file is incomplete")
        return None
    kind = _kind(name, a, b, findings, embedding=bool(embedding))
    if kind is None or settings is None:
        return None
    rank = a.shape[0]
    if rank != settings.rank(name):
        expected = settings.rank(name)
        findings.add(
            "rank_mismatch",
            f"{name} has rank {rank} in the file, the config says {expected}",
            "correct r or rank_pattern: the scaling follows them",
        )
    if not settings.is_targeted(name):
        findings.add(
            "not_targeted",
            f"{name} is adapted, but the config does not target it: PEFT would ignore it",
            "list the module in target_modules, and see exclude_modules and layers_to_transform",
        )
    _check_bias(name, b, bias, settings, findings)
    return LoraModule(name, kind, rank, settings.scaling(name), a, b, bias)


def _kind(name: str, a: TensorEntry, b: TensorEntry, findings: Findings, *, embedding: bool) -> ModuleKind | None:
    if len(a.shape) == len(b.shape) == 2 and b.shape[1] == a.shape[0]:
        return "embedding" if embedding else "linear"
    if 3 <= len(a.shape) == len(b.shape) <= 5 and not embedding and set(b.shape[2:]) == {1}:
        if b.shape[1] == a.shape[0]:
            return "conv"
        findings.add(
            "conv_groups",
            f"{name} is a grouped convolution: lora_A is {list(a.shape)}, lora_B {list(b.shape)}",
            "only convolutions with groups=1 can be merged",
        )
        return None
    findings.add("shape_mismatch", f"{name}: lora_A is {list(a.shape)}, lora_B {list(b.shape)}, their ranks disagree")
    return None


def _check_bias(name: str, b: TensorEntry, bias: TensorEntry | None, settings: LoraConfig, findings: Findings) -> None:
    if bias is None:
        if settings.lora_bias:
            findings.add("missing_lora_bias", f"{name} has no lora_B.bias, though the config sets lora_bias")
        return
    if not settings.lora_bias:
        findings.add("unexpected_lora_bias", f"{name} has a lora_B.bias, though the config does not set lora_bias")
    if bias.shape != b.shape[:1]:
        findings.add("shape_mismatch", f"{name}: lora_B.bias is {list(bias.shape)}, expected {list(b.shape[:1])}")
