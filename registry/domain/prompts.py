"""How an adapter is spoken to, as far as one can tell; and whether two that are merged would be spoken to alike.

A merged adapter knows what it is asked by the form of the prompt alone: where two parents share their form, neither of
their tasks can be asked for. Forms are declared by the tag `prompt_template`, or seen from what all prompts of a suite
begin and end with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .suite import Suite

TEMPLATE_TAG, TOKENIZER_TAG = "prompt_template", "tokenizer"
#: Where the text of the user stands in a declared template.
SLOT = re.compile(r"\{\{?[^{}]*\}?\}")
#: A marker begins with signs, and so many in a row are taken for one word by a model that has seen few examples.
_SIGNS = re.compile(r"[^\w\s]{3,}")
_SEEN = 500


@dataclass(frozen=True, slots=True)
class PromptForm:
    """What stands before and after the text of the user; both empty where nothing is known or nothing stands there."""

    before: str
    after: str

    @property
    def signs(self) -> set[str]:
        return {signs[:3] for signs in _SIGNS.findall(f"{self.before}\n{self.after}")}

    def __str__(self) -> str:
        return f"{self.before}…{self.after}"


def prompt_form(tags: Mapping[str, str], suites: Sequence[Suite]) -> PromptForm | None:
    """The form that the tag declares, or else what the prompts of all suites share; None where there is neither."""
    declared = tags.get(TEMPLATE_TAG)
    if declared:
        before, _, after = SLOT.sub("\0", declared, count=1).partition("\0")
        return PromptForm(before.strip(), after.strip())
    prompts = [row.prompt for suite in suites for task in suite.tasks for row in task.rows[:_SEEN]]
    if len(prompts) < 2:
        return None
    before, after = _shared_start(prompts), _shared_start([prompt[::-1] for prompt in prompts])[::-1]
    # words that all samples happen to share are no marker
    form = PromptForm(before.strip(), after.strip())
    return form if re.search(r"[^\w\s]", form.before + form.after) else None


def prompt_warnings(labels: Sequence[str], forms: Sequence[PromptForm | None]) -> list[str]:
    """One line for every two parents whose prompts cannot be told apart, or only just."""
    known = [(label, form) for label, form in zip(labels, forms, strict=True) if form is not None]
    warnings = []
    for (first, one), (second, other) in combinations(known, 2):
        if first.partition(":")[0] == second.partition(":")[0]:
            continue  # versions of one adapter do one task
        if one == other:
            warnings.append(
                f"{first} and {second} take prompts of the same form ({one}): the merge cannot tell which is meant"
            )
        elif shared := sorted(one.signs & other.signs):
            warnings.append(
                f"the prompts of {first} ({one}) and {second} ({other}) both use {' '.join(shared)}: "
                "evaluate whether the merge still switches"
            )
    return warnings


def tokenizer_warnings(labels: Sequence[str], tags: Sequence[Mapping[str, str]]) -> list[str]:
    """Parents that say to need different tokenizers, by the tag `tokenizer`."""
    named = {label: each[TOKENIZER_TAG] for label, each in zip(labels, tags, strict=True) if TOKENIZER_TAG in each}
    if len(set(named.values())) < 2:
        return []
    told = ", ".join(f"{label} {name}" for label, name in named.items())
    return [f"the parents were trained with different tokenizers: {told}"]


def _shared_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all between them share
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:count]
