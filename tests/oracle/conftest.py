"""Tiny random models, and adapters that PEFT itself made for them: the oracle is PEFT with every parent active."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


class Convolutions(nn.Module):
    """A stack of one convolution kind, with a kernel, a stride and a pointwise layer."""

    def __init__(self, kind: type[nn.Module], dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.first = kind(3, 8, kernel_size=3, stride=2, padding=1)
        self.second = kind(8, 6, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Embedder(nn.Module):
    """An embedding with a head, not inside a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x))


def _llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **options,
        )
    )


def _gpt2(**options: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, **options))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama_bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "gpt2": _gpt2,
    "gpt2_untied": lambda: _gpt2(tie_word_embeddings=False),
    "conv1d": lambda: Convolutions(nn.Conv1d, 1),
    "conv2d": lambda: Convolutions(nn.Conv2d, 2),
    "conv3d": lambda: Convolutions(nn.Conv3d, 3),
    "embedder": Embedder,
}


@dataclass
class Bench:
    """Bases (built once, never changed: PEFT works on copies) and what is done with them."""

    bases: dict[str, nn.Module] = field(default_factory=dict)

    def base(self, name: str) -> nn.Module:
        if name not in self.bases:
            torch.manual_seed(0)
            self.bases[name] = MODELS[name]().eval()
        return copy.deepcopy(self.bases[name])

    def inputs(self, name: str) -> torch.Tensor:
        random = torch.Generator().manual_seed(1)
        if name.startswith("conv"):
            return torch.randn(2, 3, *[9] * int(name[4]), generator=random)
        return torch.randint(0, VOCABULARY, (2, 11), generator=random)

    def save_base(self, name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shards: str = "5GB") -> Path:
        """Write base `name` in `dtype` as transformers saves it."""
        self.base(name).to(dtype).save_pretrained(folder, max_shard_size=shards)
        return folder

    def save_adapter(
        self,
        name: str,
        folder: Path,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        kind: type[PeftConfig] = LoraConfig,
        **config: Any,
    ) -> Path:
        """Write an adapter with random factors for base `name`, as PEFT saves it."""
        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha" if kind is LoraConfig else "alpha": 8, **config}
        model = get_peft_model(self.base(name), kind(**options), autocast_adapter_dtype=False)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if re.search("lora_|hada_|lokr_", key):
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
                    parameter.data = parameter.data.to(dtype)
        with warnings.catch_warnings():
            # PEFT 0.21 takes a bias of lora_B, which has one axis, for a shard that was not gathered
            warnings.filterwarnings("ignore", ".*LoRA tensor.s. have invalid shape")
            model.save_pretrained(str(folder), save_embedding_layers=False)
        return folder

    def together(self, name: str, folders: Sequence[Path], weights: Sequence[float]) -> torch.Tensor:
        """Output of the base with every parent active, each at its weight: what a merge must compute."""
        model = PeftModel.from_pretrained(self.base(name), str(folders[0]), adapter_name="p0")
        for i, folder in enumerate(folders[1:], start=1):
            model.load_adapter(str(folder), adapter_name=f"p{i}")
        model.base_model.set_adapter([f"p{i}" for i in range(len(folders))])
        for layer in lora_layers(model).values():
            for i, weight in enumerate(weights):
                if f"p{i}" in layer.scaling:
                    layer.scaling[f"p{i}"] *= weight
        return self._output(model, name)

    def merged(self, name: str, folder: Path) -> tuple[torch.Tensor, set[str]]:
        """Output of the base with one adapter, and the modules that PEFT put it on."""
        model = PeftModel.from_pretrained(self.base(name), str(folder))
        return self._output(model, name), set(lora_layers(model))

    def plain(self, name: str) -> torch.Tensor:
        return self._output(self.base(name), name)

    def _output(self, model: nn.Module, name: str) -> torch.Tensor:
        model.eval()
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            output = model(self.inputs(name))
        return output if isinstance(output, torch.Tensor) else output.logits


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Module path in the base to PEFT's layer around it."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


@pytest.fixture(scope="session")
def bench() -> Bench:
    torch.set_num_threads(1)
    return Bench()
