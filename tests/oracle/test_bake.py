"""A baked model is what PEFT's `merge_and_unload` gives in float64, each value rounded once; transformers loads it.

PEFT with the adapter unmerged is the oracle of what is computed, its merge in float64 that of every bit that is stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.services.bake import bake
from adapterctl.registry.services.local import LocalRegistry

TOLERANCE = 1e-5
TIED = ("llama_tied", "gpt2")
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setup:
    base: str
    config: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    shards: str = "5GB"
    asked: Mapping[str, Any] = field(default_factory=dict)
    bare: str = ""


SETUPS = {
    "attention": Setup("llama", {"target_modules": ATTENTION}),
    "sharded, in bfloat16": Setup("llama", {"target_modules": LINEAR}, torch.bfloat16, "20KB", {"shard_bytes": 30_000}),
    "float16": Setup("llama", {"target_modules": LINEAR}, torch.float16),
    "float32 to bfloat16": Setup("llama", {"target_modules": ATTENTION}, asked={"dtype": "BF16"}),
    "bfloat16 to float32": Setup("llama", {"target_modules": ATTENTION}, torch.bfloat16, asked={"dtype": "F32"}),
    "rslora and patterns": Setup(
        "llama",
        {
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "biases": Setup("llama_bias", {"target_modules": ATTENTION, "lora_bias": True}, torch.bfloat16),
    "embedding and head": Setup("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": Setup("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": Setup("llama_tied", {"target_modules": ["lm_head", "q_proj"]}, torch.bfloat16, "9KB"),
    "tied, both": Setup("llama_tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "Conv1D": Setup("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, shards="20KB"),
    "Conv1D, positions": Setup("gpt2", {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}, torch.bfloat16),
    "Conv1D, a head": Setup("gpt2", {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}),
    "Conv1D, tied embedding": Setup("gpt2", {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True}),
    "saved without a head": Setup("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}, bare="transformer."),
    "saved without a head, tied": Setup(
        "gpt2", {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True}, bare="transformer."
    ),
    "saved without a head, tied head": Setup(
        "gpt2", {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}, bare="transformer."
    ),
}


@pytest.fixture(scope="module")
def registry(two_parents: LocalRegistry) -> LocalRegistry:
    return two_parents


@pytest.fixture
def baked(registry: LocalRegistry, bench: Any, tmp_path: Path) -> Callable[[Setup], tuple[Path, Path]]:
    """Bake an adapter of the setup; returns its folder, and that of the new model."""

    def make(setup: Setup) -> tuple[Path, Path]:
        base = bench.save_base(setup.base, tmp_path / "base", dtype=setup.dtype, shards=setup.shards)
        if setup.bare:  # as the hub has GPT-2
            weights = load_file(base / "model.safetensors")
            bare = {key.removeprefix(setup.bare): value for key, value in weights.items()}
            save_file(bare, base / "model.safetensors", {"format": "pt"})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(tie_word_embeddings|fan_in_fan_out).*")
            adapter = bench.save_adapter(setup.base, tmp_path / "adapter", seed=3, **setup.config)
        version = registry.register(str(adapter), name="adapter", base="tiny/llama").version
        out = tmp_path / "out"
        bake(registry, parse_ref(version.ref), out, base=base, settings=registry.settings, **setup.asked)
        return adapter, out

    return make


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|fan_in_fan_out|no longer tied).*")
@pytest.mark.parametrize("name", SETUPS)
def test_a_baked_model_is_the_exact_sum_rounded_once(name: str, baked: Any, bench: Any, tmp_path: Path):
    setup = SETUPS[name]

    adapter, out = baked(setup)

    # a head of its own is stored beside whole names only
    bare = setup.bare if stays_tied(setup) else ""
    stored = {bare + key: value for key, value in tensors(out).items()}
    kind = next(iter(stored.values())).dtype
    expected = exact(bench, setup, adapter)
    assert stored.keys() == expected.keys() - ({"lm_head.weight"} if stays_tied(setup) else set())
    assert all(torch.equal(bits(stored[key]), bits(nearest(expected[key], kind))) for key in stored)
    model = AutoModelForCausalLM.from_pretrained(out).float()
    with torch.no_grad():
        logits = model(bench.inputs(setup.base)).logits
    wanted = unmerged(bench, setup, adapter)
    tolerance = TOLERANCE if kind is torch.float32 else 0.05
    assert float((logits - wanted).norm() / wanted.norm()) <= tolerance
    plain = bench.plain(setup.base)
    assert float((plain - wanted).norm() / wanted.norm()) > 3 * tolerance, "the adapter changes nothing: no test"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_what_merge_and_unload_gives_where_that_keeps_the_adapter_in_float32(
    dtype: torch.dtype, baked: Any, bench: Any
):
    setup = Setup("llama", {"target_modules": LINEAR}, dtype)

    adapter, out = baked(setup)

    stored = tensors(out)
    merged = PeftModel.from_pretrained(bench.base("llama").to(dtype), str(adapter)).merge_and_unload().state_dict()
    pairs = [(bits(stored[key]).flatten(), bits(merged[key]).flatten()) for key in stored]
    ours, theirs = (torch.cat(side).long() for side in zip(*pairs, strict=True))
    # PEFT adds in float32, which is rounded once more
    assert float((ours != theirs).float().mean()) < 1e-3
    assert int((ours - theirs).abs().max()) <= 1


def stays_tied(setup: Setup) -> bool:
    """Whether the head stays the embedding's tensor, which is stored once."""
    return setup.base in TIED and not {"lm_head", "embed_tokens", "wte"} & {*setup.config["target_modules"]}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


def wide(bench: Any, setup: Setup, adapter: Path) -> PeftModel:
    """PEFT on the base as it is stored, everything in float64, where nothing is rounded."""
    base = rounded(bench, setup).double()
    if setup.base in TIED:  # what PEFT asks for before such a merge: a head of its own
        base.config.tie_word_embeddings = False
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    return PeftModel.from_pretrained(base, str(adapter)).double()


def rounded(bench: Any, setup: Setup) -> nn.Module:
    """The base with the weights that it is stored with, in float32; its buffers are not stored, and stay."""
    base: nn.Module = bench.base(setup.base)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(setup.dtype).float()
    return base


def exact(bench: Any, setup: Setup, adapter: Path) -> dict[str, torch.Tensor]:
    return wide(bench, setup, adapter).merge_and_unload().state_dict()


def unmerged(bench: Any, setup: Setup, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(rounded(bench, setup), str(adapter)).float().eval()
    with torch.no_grad():
        logits: torch.Tensor = model(bench.inputs(setup.base)).logits
    return logits


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values to the nearest of `dtype`, ties to even, by trying neighbours: torch goes by way of float32."""
    if dtype is torch.float32:
        return values.to(dtype)
    first = values.to(dtype)
    steps = torch.tensor([-1, 0, 1], dtype=torch.int16)
    tried = (first.view(torch.int16)[..., None] + steps).view(dtype)
    far = (tried.double() - values[..., None]).abs().nan_to_num(torch.inf)  # before a zero comes a NaN
    odd = (tried.view(torch.int16) & 1).double()
    return tried.gather(-1, (far + odd * far.min(-1, keepdim=True).values * 1e-13).argmin(-1, keepdim=True))[..., 0]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)
