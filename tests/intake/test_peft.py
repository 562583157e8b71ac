"""What PEFT itself saves is read as PEFT means it: modules, ranks and scaling of every module, for many configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import carrying
from torch import nn

from adapterctl.registry.domain.errors import InvalidAdapter
from adapterctl.registry.services.register import inspect


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.conv1 = nn.Conv1d(3, 4, 3)
        self.conv2 = nn.Conv2d(3, 4, (3, 2))
        self.conv3 = nn.Conv3d(3, 4, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks every causal model for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed_tokens(x))


def save(folder: Path, **config: Any) -> tuple[Path, dict[str, tuple[int, float]]]:
    """A folder as PEFT saves it, and PEFT's own rank and scaling of each module."""
    model = get_peft_model(Net(), LoraConfig(**config))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and "default" in {**layer.lora_A, **layer.lora_embedding_A}
    }
    return folder, expected


Q = ["q_proj", "v_proj"]

# PEFT's own words about lora_bias and grouped convolutions, which it saves all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LoRA tensor\\(s\\) have invalid shape"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": Q},
        {"target_modules": Q, "r": 4, "lora_alpha": 32},
        {"target_modules": Q, "r": 4, "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"], "r": 2},
        {"target_modules": ["conv1", "conv2", "conv3"], "r": 2},
        {"target_modules": ["layers.1.q_proj"]},
        {"target_modules": r".*layers\.[02]\.q_proj"},
        {"target_modules": Q, "exclude_modules": ["layers.0.q_proj"]},
        {"target_modules": Q, "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": Q, "lora_bias": True},
        {"target_modules": Q, "rank_pattern": {"layers.0.q_proj": 3, "q_proj": 2}, "alpha_pattern": {"v_proj": 64}},
        {"target_modules": Q, "rank_pattern": {r"layers\.[01]\.q_proj": 3}, "use_rslora": True},
        {"target_modules": Q, "rank_pattern": {"^layers.0.q_proj": 3}, "alpha_pattern": {r".*\d\.(q|v)_proj": 5}},
        {"target_modules": Q, "fan_in_fan_out": False, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"target_modules": Q, "init_lora_weights": "gaussian"},
        {"target_modules": Q, "init_lora_weights": False},
        {"target_modules": Q, "init_lora_weights": "orthogonal"},
        {"target_modules": Q, "init_lora_weights": "Gaussian"},
        {"target_modules": Q, "r": 4, "init_lora_weights": "MiCA"},
    ],
)
def test_modules_ranks_and_scaling_are_those_of_peft(tmp_path, config):
    folder, expected = save(tmp_path, **config)

    facts = inspect(folder)

    assert expected
    assert {module.name: (module.rank, module.scaling) for module in facts.modules} == expected


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"target_modules": Q, "use_dora": True}, "dora"),
        ({"target_modules": Q, "bias": "all"}, "bias"),
        ({"target_modules": Q, "modules_to_save": ["head"]}, "modules_to_save"),
        ({"target_modules": Q, "trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_tokens"),
        ({"target_modules": Q, "init_lora_weights": "pissa"}, "unconverted_init"),
        ({"target_modules": Q, "init_lora_weights": "olora"}, "unconverted_init"),
        ({"target_modules": Q, "init_lora_weights": "OLoRA"}, "unconverted_init"),
        ({"target_modules": Q, "kasa_config": {}, "r": 2}, "kasa"),
        ({"target_modules": Q, "velora_config": {}}, "unknown_tensors"),
        ({"target_modules": Q, "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora"),
        ({"target_modules": ["grouped"], "r": 4}, "conv_groups"),
        ({"target_modules": ["attention"]}, "multihead_attention"),
        ({"target_modules": r"attention|.*\.q_proj"}, "multihead_attention"),
    ],
)
def test_what_cannot_be_added_is_refused_as_peft_saves_it(tmp_path, config, code):
    folder, _ = save(tmp_path, **config)

    with pytest.raises(InvalidAdapter) as caught:
        inspect(folder)

    assert code in {problem.code for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("carried", "asked", "found"),
    [("default", "default", True), ("default", "mine", False), ("mine", "default", False)],
)
def test_peft_loads_names_with_an_adapter_name_under_that_name_alone(tmp_path, carried, asked, found):
    """What `register` warns of and `export --layout` refuses."""
    source, _ = save(tmp_path / "plain", target_modules=Q, init_lora_weights=False)
    folder = carrying(carried, source, tmp_path / "named")
    model = get_peft_model(Net(), LoraConfig(target_modules=Q), adapter_name=asked)

    outcome = model.load_adapter(str(folder), adapter_name=asked)

    assert bool(outcome.missing_keys) is not found
    assert bool(outcome.unexpected_keys) is not found


def test_peft_adds_the_delta_of_an_attentions_output_twice():
    """Why such an adapter is refused: no B·A in its file is what PEFT computes with it."""
    torch.manual_seed(0)
    base = Net().double()
    weight = base.attention.out_proj.weight.detach().clone()
    config = LoraConfig(target_modules=["attention"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    delta = base.attention.base_layer.out_proj.get_delta_weight("default").detach()

    model.merge_and_unload()

    assert torch.allclose(base.attention.out_proj.weight, weight + 2 * delta)
    assert delta.abs().max() > 1e-3


def test_patterns_whose_order_is_lost_when_peft_sorts_them_on_saving_are_refused(tmp_path):
    folder, expected = save(tmp_path, target_modules=Q, rank_pattern={"q_proj": 2, "layers.0.q_proj": 3})

    assert expected["layers.0.q_proj"][0] == 2
    with pytest.raises(InvalidAdapter, match=r"layers\.0\.q_proj has rank 2 in the file, the config says 3"):
        inspect(folder)


def test_an_embedding_that_peft_stored_along_says_how_to_save_without_it(tmp_path):
    model = get_peft_model(Net(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(str(tmp_path))

    with pytest.raises(InvalidAdapter, match="save_embedding_layers=False"):
        inspect(tmp_path)
