"""A tiny model with a tokenizer and two adapters, all made by code, and suites of a few lines for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
ROWS = [
    {"id": "a", "prompt": "un chat ->", "target": " a cat"},
    {"id": "b", "prompt": "deux chiens et un oiseau ->", "target": " two dogs and a bird"},
    {"id": "c", "prompt": "été ->", "target": " summer"},
    {"id": "d", "prompt": "oui ->", "target": " yes"},
    {"id": "e", "prompt": "la porte est ouverte ->", "target": " the door is open"},
]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 60,000 parameters over bytes. Its last layer is scaled so that some answers end early."""
    folder = tmp_path_factory.mktemp("tiny-base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[vocabulary[END]] *= 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters that change the answers; with dropout, which must be off while they are evaluated."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=2, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "up_proj"], init_lora_weights=False
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_base), config)
        folder = tmp_path_factory.mktemp(f"tiny-adapter-{seed}")
        model.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture
def write_suite(tmp_path: Path) -> Callable[..., Path]:
    """Write a suite file and its data; `text` is the YAML below the name."""

    def write(text: str, *, rows: list[dict[str, str]] | None = None, name: str = "tiny") -> Path:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows or ROWS)
        (tmp_path / "rows.jsonl").write_text(data + "\n", encoding="utf-8")
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"name: {name}\n{text}", encoding="utf-8")
        return path

    return write
