"""Prompts that a merge could not tell apart are noticed before it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterctl.registry.domain.prompts import PromptForm, prompt_form, prompt_warnings, tokenizer_warnings
from adapterctl.registry.domain.suite import Row, Suite, SuiteTask
from adapterctl.registry.services.suites import load_suite

SUITES = Path(__file__).parents[2] / "examples" / "suites"


def _suite(*prompts: str) -> Suite:
    rows = tuple(Row(f"r{i}", prompt, " x") for i, prompt in enumerate(prompts))
    task = SuiteTask("t", "r.jsonl", "0" * 64, "{{ prompt }}", "{{ target }}", ("nll",), "nll", 8, (), 9, 0, rows)
    return Suite("t", (task,))


def test_the_form_is_what_all_prompts_of_the_suites_begin_and_end_with():
    assert prompt_form({}, [load_suite(SUITES / "translate.yaml")]) == PromptForm("", "###>")
    assert prompt_form({}, [load_suite(SUITES / "chat.yaml")]) == PromptForm("### Human:", "### Assistant:")


def test_a_declared_form_goes_before_the_one_that_is_seen():
    tags = {"prompt_template": "[INST] {text} [/INST]"}

    assert prompt_form(tags, [load_suite(SUITES / "chat.yaml")]) == PromptForm("[INST]", "[/INST]")


@pytest.mark.parametrize("prompts", [("one",), ("one", "two"), ("the cat", "the dog")])
def test_words_that_samples_happen_to_share_are_no_form(prompts: tuple[str, ...]):
    assert prompt_form({}, [_suite(*prompts)]) is None


def test_equal_forms_collide_and_shared_signs_nearly_do():
    human, arrow, other = PromptForm("### Human:", ""), PromptForm("", "###>"), PromptForm("Q:", "A:")

    (same,) = prompt_warnings(["a:v1", "b:v1"], [human, human])
    (near,) = prompt_warnings(["a:v1", "b:v1"], [human, arrow])

    assert "a:v1 and b:v1 take prompts of the same form (### Human:…)" in same
    assert "both use ###" in near
    assert prompt_warnings(["a:v1", "b:v1"], [human, other]) == []
    assert prompt_warnings(["a:v1", "a:v2"], [human, human]) == []  # versions of one adapter do one task
    assert prompt_warnings(["a:v1", "b:v1"], [human, None]) == []


def test_tokenizers_are_compared_where_they_are_named():
    assert tokenizer_warnings(["a", "b"], [{"tokenizer": "x"}, {}]) == []
    assert tokenizer_warnings(["a", "b"], [{"tokenizer": "x"}, {"tokenizer": "y"}]) == [
        "the parents were trained with different tokenizers: a x, b y"
    ]
