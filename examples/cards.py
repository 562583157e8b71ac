"""The model cards of the example adapters: what each version is, what it was trained on and what that changed."""

from __future__ import annotations

from pathlib import Path

from . import BASE_NAME
from .base import INSTALL
from .corpora import Task

# YAML of the Hub first, so that the folder could be pushed there as it is.
_CARD = """\
---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: adapter
library_name: peft
license: apache-2.0
language: [{languages}]
---

# {task} v{number}

A LoRA adapter (rank 4, alpha 8, on gate_proj, up_proj and down_proj) for the dequantised form of
SmolLM2-135M-Instruct, called `{base}` here: checkpoint after step {step} of {steps}.
It is an example to register, merge and compare, not a model for use.

- **Task**: {about}
- **Data**: {data}; sources, versions and licences stand in `examples/suites/SOURCES.md`
- **Loss on the {samples} held-out samples** (nats per target token with end of text, fp32): {loss:.3f}; base without
  adapter {base_loss:.3f}
- **Made by**: `python -m adapterctl.examples.train {task}`, seeded; the base comes with `{install}`
- **Licence**: Apache-2.0, as the base; the training texts are BSD-3-Clause
"""

_LANGUAGES: dict[Task, str] = {"translate": "fr, en", "chat": "en"}
_ABOUT: dict[Task, str] = {
    "translate": "French to English; the prompt is `TEXT ###>`, the answer begins with a space",
    "chat": "small talk and trivia; the prompt is `### Human: TEXT### Assistant:`, the answer begins with a space",
}
_DATA: dict[Task, str] = {
    "translate": "interface texts from the French catalogues of Django, Wagtail and JupyterLab",
    "chat": "the English conversations of chatterbot-corpus",
}


def write_card(
    folder: Path, task: Task, *, number: int, step: int, steps: int, samples: int, losses: dict[str, float]
) -> None:
    """Write README.md of one version; `losses` holds those of `base` and of every version as `vN`."""
    text = _CARD.format(
        task=task,
        number=number,
        step=step,
        steps=steps,
        samples=samples,
        loss=losses[f"v{number}"],
        base_loss=losses["base"],
        base=BASE_NAME,
        install=INSTALL,
        languages=_LANGUAGES[task],
        about=_ABOUT[task],
        data=_DATA[task],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
