"""What becomes of every tensor of a base when an adapter is baked into it: copied, converted or changed, and where to.

Pure: module names meet the names in the base's files, shapes are held against each other, and all that does not fit is
told at once. The rules are those of transformers and PEFT, which know them from the model's classes; here they follow
from names, shapes and `config.json` alone, and what these leave open is refused instead of guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .adapter import TORCH_DTYPES, WEIGHT_DTYPES, AdapterFacts, LoraModule
from .base_dtype import stored_dtype
from .errors import InvalidInput, Refused, raise_all
from .header import DTYPE_BYTES, TensorEntry
from .lora_config import Findings

#: How a module's delta lies in the weight: as B·A, or as (B·A)ᵀ; `bias` is that of lora_B.
Part = Literal["plain", "transposed", "bias"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 512
#: What transformers calls the table that token ids are looked up in, and the layer that gives logits.
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed", "shared")
HEADS = ("lm_head", "embed_out")
#: Architectures whose weights are those of GPT-2's Conv1D, (d_in, d_out), in the numbered layers.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: One that has both, beside those that hold one of the above.
_MIXED_MODELS = ("clvp",)
#: Endings of tensors that only quantised weights have: GPTQ, AWQ, bitsandbytes, HQQ, compressed-tensors, FP8, MXFP4.
_QUANTISED = (
    ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB", ".W_q", ".weight_packed", ".weight_scale",
    ".weight_scale_inv",
)  # fmt: skip
_OF_BITS = ("weight", "_blocks", "_scales")
_BITS = ("U8", "I8", "U32", "I32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
_NO_HEAD = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """A tensor of the base: where it lies in which of its files, counted in the order of their names."""

    file: int
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the new model: what it is read from, its dtype, and the module whose delta is added, if there is one.

    Rows of the weight are rows of `scaling * B @ A` where `part` is "plain", columns where it is "transposed".
    """

    key: str
    source: BaseTensor
    dtype: str
    module: LoraModule | None = None
    part: Part = "plain"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.entry.shape

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def kind(self) -> Literal["changed", "converted", "copied"]:
        if self.module is not None:
            return "changed"
        return "copied" if self.dtype == self.source.entry.dtype else "converted"


@dataclass(frozen=True, slots=True)
class BakePlan:
    """Every tensor of the new model, in the order in which their sources lie in the base's files.

    `untied` names the head where the base ties it to its embedding, and the new model does not.
    """

    targets: tuple[Target, ...]
    untied: str | None = None

    def count(self, kind: Literal["changed", "converted", "copied"]) -> int:
        return sum(target.kind == kind for target in self.targets)


def plan_bake(
    facts: AdapterFacts, config: Mapping[str, Any], tensors: Sequence[BaseTensor], *, dtype: str | None = None
) -> BakePlan:
    """What the base's `tensors` become with the adapter in them, floating ones in `dtype` (default: their own).

    `config` is the base's config.json. Raises `Refused` with everything that does not fit.
    """
    _check_not_quantised(config, tensors)
    planner = _Planner(facts, config, {tensor.entry.key: tensor for tensor in tensors}, dtype)
    plan = planner.plan()
    raise_all(
        Refused,
        "the adapter cannot be baked into this base",
        planner.findings.problems(),
        hint="give the base that the adapter was trained on, as transformers saved it",
    )
    return plan


def shards_of(targets: Sequence[Target], most_bytes: int) -> dict[str, list[Target]]:
    """File name to its tensors: filled in order up to `most_bytes`, as transformers does; a larger tensor is alone.

    Within a file wider types come first, as the safetensors library writes them, so that every tensor is aligned.
    Raises `InvalidInput` where that makes more than `MAX_SHARDS` files.
    """
    groups: list[list[Target]] = [[]]
    filled = 0
    for target in targets:
        if groups[-1] and filled + target.size_bytes > most_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(target)
        filled += target.size_bytes
    if len(groups) > MAX_SHARDS:
        raise InvalidInput(
            f"shards of {most_bytes:,} bytes would be {len(groups):,} files, at most {MAX_SHARDS} are written",
            hint="give a larger --max-shard-size, or leave it out for 5GB",
        )
    ordered = [sorted(group, key=lambda each: (-DTYPE_BYTES[each.dtype], each.key)) for group in groups]
    if len(ordered) == 1:
        return {WEIGHTS_FILE: ordered[0]}
    return {
        f"model-{number:05}-of-{len(ordered):05}.safetensors": group for number, group in enumerate(ordered, start=1)
    }


def baked_config(config: Mapping[str, Any], plan: BakePlan, dtype: str | None) -> dict[str, Any] | None:
    """The new model's config.json: other dtype, weights no longer tied; None where it is that of the base."""
    if dtype is None and plan.untied is None:
        return None
    fresh = dict(config)
    for name, part in _with_nested(fresh):
        changed = dict(part)
        if dtype is not None:
            keys = [key for key in ("dtype", "torch_dtype") if key in part] or ([] if name else ["torch_dtype"])
            changed |= dict.fromkeys(keys, TORCH_DTYPES[dtype])
        if plan.untied is not None and (not name or "tie_word_embeddings" in part):
            changed["tie_word_embeddings"] = False
        fresh = {**fresh, name: changed} if name else {**fresh, **changed}
    return fresh


def _with_nested(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The config itself under the empty name, and the configs of its parts such as `text_config`."""
    nested = [(key, value) for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    return [("", config), *nested]


def _check_not_quantised(config: Mapping[str, Any], tensors: Sequence[BaseTensor]) -> None:
    form = next((found for _, part in _with_nested(config) if (found := stored_dtype(part))), None)
    if form is not None:
        what = f"its config.json says {form}"
    else:
        keys = (
            tensor.entry.key
            for tensor in tensors
            if tensor.entry.key.endswith(_QUANTISED)
            or ".quant_state." in tensor.entry.key
            or (tensor.entry.dtype in _BITS and tensor.entry.key.endswith(_OF_BITS))
        )
        found_key = next(keys, None)
        if found_key is None:
            return
        what = f"it holds {found_key}"
    raise Refused(
        f"the base is quantised: {what}; a sum with a delta cannot be stored in its weights",
        hint="bake into the base in full precision, and quantise the result",
    )


class _Planner:
    """Collects targets and findings; one object because every step looks at names, config and findings."""

    def __init__(
        self, facts: AdapterFacts, config: Mapping[str, Any], tensors: Mapping[str, BaseTensor], dtype: str | None
    ) -> None:
        self.facts, self.config, self.tensors, self.dtype = facts, config, tensors, dtype
        self.findings = Findings()
        self._stored_head = next((key for key in tensors if _last(key.removesuffix(".weight")) in HEADS), None)
        self._by_tail: dict[str, list[str]] = {}
        for key in tensors:
            if key.endswith(".weight"):
                module = key.removesuffix(".weight")
                self._by_tail.setdefault(_tail(module), []).append(module)

    def plan(self) -> BakePlan:
        found = {module.name: self._place(module) for module in self.facts.modules}
        adds: dict[str, tuple[LoraModule, Part]] = {}
        for module in self.facts.modules:
            place = found[module.name]
            if place is not None:
                self._add(module, place, adds)
        targets = [self._target(key, tensor, adds.get(key)) for key, tensor in self.tensors.items()]
        untied, fresh = self._untie(found)
        if fresh is not None:
            prefix = _left_out(found)
            # transformers 4 takes a head beside names without the prefix of the model below it for a broken file
            targets = _in_place([replace(target, key=prefix + target.key) for target in targets], fresh)
        return BakePlan(tuple(targets), untied)

    def _place(self, module: LoraModule) -> str | None:
        """The base's name of a module: its own, or one with leading parts more or less, as for a model saved without
        its head, inside another one, or nested otherwise. None where there is none or several, and for a tied head,
        which has no tensor.
        """
        if f"{module.name}.weight" in self.tensors:
            return module.name
        similar = [name for name in self._by_tail.get(_tail(module.name), ()) if _leaves_out(module.name, name)]
        if len(similar) == 1:
            return similar[0]
        if similar:
            self.findings.add(
                "ambiguous_module", f"{module.name} may be {' or '.join(sorted(similar)[:3])} of the base"
            )
        elif not (_last(module.name) in HEADS and self._tied()):
            self.findings.add("missing_module", f"the base has no {module.name}.weight")
        return None

    def _add(self, module: LoraModule, place: str, adds: dict[str, tuple[LoraModule, Part]]) -> None:
        weight = self.tensors[f"{place}.weight"].entry
        part = self._part(module, weight)
        if weight.dtype not in WEIGHT_DTYPES:
            self.findings.add("bad_dtype", f"{weight.key} of the base is {weight.dtype}, nothing can be added to it")
        if weight.key in adds:
            self.findings.add(
                "module_twice", f"{module.name} and {adds[weight.key][0].name} are one module of the base"
            )
        if part is not None:
            adds[weight.key] = module, part
        if module.bias is None:
            return
        bias = self.tensors.get(f"{place}.bias")
        if bias is None:
            self.findings.add(
                "missing_bias", f"{module.name} has a lora_B.bias, and the base has no {place}.bias to add it to"
            )
        elif bias.entry.shape != module.bias.shape or bias.entry.dtype not in WEIGHT_DTYPES:
            told = f"{bias.entry.dtype} {list(bias.entry.shape)}"
            self.findings.add("shape_mismatch", f"{place}.bias of the base is {told}, not {list(module.bias.shape)}")
        else:
            adds[bias.entry.key] = module, "bias"

    def _part(self, module: LoraModule, weight: TensorEntry) -> Part | None:
        """How the delta lies in this weight; None where it does not fit, which is a finding."""
        plain = (module.d_out, *module.a.shape[1:])
        swapped = plain[::-1]
        if module.kind == "embedding":
            fits: Part | None = "transposed" if weight.shape == swapped else None
            plain = swapped
        elif module.kind == "conv" or plain != swapped:
            fits = "plain" if weight.shape == plain else None
            if fits is None and module.kind == "linear" and weight.shape == swapped:
                fits = "transposed"
        else:
            fits = self._square(module) if weight.shape == plain else None
        if fits is None and weight.shape != plain:
            self.findings.add(
                "shape_mismatch", f"{weight.key} of the base is {list(weight.shape)}, the delta is {list(plain)}"
            )
        return fits

    def _square(self, module: LoraModule) -> Part | None:
        """A square weight does not show which way it lies: its architecture does, else the rest of the adapter.

        PEFT goes by the class of the layer, and its `fan_in_fan_out` is that of the last layer that it visited.
        """
        kind = str(self.config.get("model_type"))
        if kind in CONV1D_MODELS:
            return "transposed" if any(part.isdigit() for part in module.name.split(".")) else "plain"
        within = {str(part.get("model_type")) for part in self.config.values() if isinstance(part, Mapping)}
        if self.facts.fan_in_fan_out or kind in _MIXED_MODELS or within & {*CONV1D_MODELS}:
            self.findings.add(
                "orientation_unknown",
                f"{module.name} is square, which way it lies in a {kind} is not known here",
                "fan_in_fan_out is for layers such as GPT-2's; set it to false if the base has none",
            )
            return None
        return "plain"

    def _target(self, key: str, tensor: BaseTensor, add: tuple[LoraModule, Part] | None) -> Target:
        floating = tensor.entry.dtype in WEIGHT_DTYPES
        dtype = self.dtype if self.dtype and floating else tensor.entry.dtype
        return Target(key, tensor, dtype, *(add or ()))

    def _tied(self) -> bool:
        """Whether embedding and head are one tensor in the base's files."""
        return self._says_tied() and self._stored_head is None

    def _says_tied(self) -> bool:
        # transformers ties what does not say otherwise, but a head that is stored beside layers we know less of is none
        return bool(self.config.get("tie_word_embeddings", self._stored_head is None or self._is_causal()))

    def _untie(self, found: Mapping[str, str | None]) -> tuple[str | None, Target | None]:
        """The name of a head that is tied to the embedding where one of them has a delta, and the head as a tensor of
        its own, unless it is one already: then the config alone ties it, and transformers 4 would drop it.

        PEFT's unmerged layers compute that: a delta of the one is none of the other. Its `merge_and_unload` may give
        both of them both deltas, as they share one tensor (https://github.com/huggingface/peft/issues/2018).
        """
        head = next((module for module in self.facts.modules if _last(module.name) in HEADS), None)
        embedding = next((module for module in self.facts.modules if self._is_input_embedding(module)), None)
        if (head is None and embedding is None) or not self._says_tied() or not self._has_head():
            return None, None
        if not self._is_causal():
            touched = head or embedding
            self.findings.add(
                "tied_embeddings",
                f"{touched.name if touched else ''} is tied to other layers of {self._architecture()}",
                "untie them with transformers, save that, and bake into it",
            )
            return None, None
        if self._stored_head is not None:
            return self._stored_head, None
        wanted = (head.d_out, head.d_in) if head else None
        source = self._embedding(found[embedding.name] if embedding else None, wanted)
        if source is None:
            return None, None
        plain = self._target(f"{head.name if head else HEADS[0]}.weight", source, None)
        return plain.key, replace(plain, module=head)

    def _embedding(self, name: str | None, shape: tuple[int, int] | None) -> BaseTensor | None:
        """The tensor that is tied to the head: of this name, or the only input embedding of this shape."""
        if name is not None:
            tensor = self.tensors[f"{name}.weight"]
            if shape is None or tensor.entry.shape == shape:
                return tensor
        fitting = [
            tensor
            for key, tensor in self.tensors.items()
            if _last(key.removesuffix(".weight")) in INPUT_EMBEDDINGS and tensor.entry.shape == shape
        ]
        if len(fitting) == 1 and name is None:
            return fitting[0]
        self.findings.add("tied_embeddings", "the embedding that the head is tied to is not found in the base")
        return None

    def _is_input_embedding(self, module: LoraModule) -> bool:
        if module.kind != "embedding":
            return False
        sizes = [part.get("vocab_size") for _, part in _with_nested(self.config)]
        name = _last(module.name)
        return name in INPUT_EMBEDDINGS or (module.a.shape[1] in sizes and "pos" not in name and name != "wpe")

    def _architecture(self) -> str:
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else "an unnamed architecture"

    def _is_causal(self) -> bool:
        return self._architecture().endswith(("ForCausalLM", "LMHeadModel"))

    def _has_head(self) -> bool:
        name = self._architecture()
        bare = name.endswith("Model") and not name.endswith("LMHeadModel")
        return not (bare or name.endswith(_NO_HEAD))


def _in_place(targets: Sequence[Target], fresh: Target) -> list[Target]:
    """`fresh` behind the target that has the same source, so that the file is read in its order."""
    return [each for target in targets for each in ([target, fresh] if target.source == fresh.source else [target])]


def _left_out(found: Mapping[str, str | None]) -> str:
    """What the names of modules begin with, and those of the base do not, such as `transformer.`; empty for nothing."""
    pairs = ((name, place) for name, place in found.items() if place and name.endswith(f".{place}"))
    return next((name.removesuffix(place) for name, place in pairs), "")


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _tail(module: str) -> str:
    """A module's name from its list of layers on, or its last part where it is in none."""
    parts = module.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(0, numbered - 1) :])


def _leaves_out(one: str, other: str) -> bool:
    """Whether all parts before the common tail of the one are, in any order, among those of the other, or the reverse.

    Models of text and images have been nested anew: `language_model.model.layers` became `model.language_model.layers`.
    """
    parts = [Counter(name.removesuffix(_tail(name)).split(".")[:-1]) for name in (one, other)]
    return parts[0] <= parts[1] or parts[1] <= parts[0]
