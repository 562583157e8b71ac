"""Lets `mlflow.pyfunc.load_model("models:/NAME@production")` answer prompts with an adapter on its base.

Named as `loader_module` in the MLmodel file of every version; needs the extra `eval` (torch, transformers, peft) where
it is used. The base is not stored with the adapter: it is the hub id that the MLmodel names, or any folder given as
`mlflow.pyfunc.load_model(uri, model_config={"base_model": "/models/base"})`. Nothing but safetensors is loaded, and
no code of a model repository is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .registry.domain.adapter import PLAIN_NAMES

PROMPT_COLUMN = "prompt"


class AdapterModel:
    """A base with one adapter, answering greedily."""

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Continue each prompt of a text, a list of texts, or a table (its column `prompt`, or the only one).

        A table is pandas', a mapping of columns, or a list of rows. Raises `ValueError` for what is none of them.
        `params` may hold `max_new_tokens`. Prompts are answered one by one: padding would change the answers.
        """
        asked = (params or {}).get("max_new_tokens")  # MLflow fills in None where the caller says nothing
        limit = self._max_new_tokens if asked is None else int(asked)
        if limit < 1:
            raise ValueError(f"max_new_tokens is {limit}, expected at least 1")
        return [self._answer(prompt, limit) for prompt in _prompts(model_input)]

    def _answer(self, prompt: str, limit: int) -> str:
        encoded = self._tokenizer(prompt, return_tensors="pt").to(self._model.device)
        if not encoded["input_ids"].numel():
            raise ValueError(f"the prompt {prompt[:80]!r} has no tokens, expected at least one to go on from")
        tokens = self._model.generate(
            **encoded, max_new_tokens=limit, do_sample=False, pad_token_id=self._tokenizer.eos_token_id
        )
        return str(self._tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> AdapterModel:
    """MLflow's hook: `path` is a version's folder, `model_config` that of its MLmodel with the caller's changes."""
    config = model_config or {}
    base, revision = str(config["base_model"]), config.get("base_revision")
    try:
        from peft import PeftConfig, PeftModel  # deferred: the registry does without torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'adapterctl[eval]' to load adapters") from error
    pinned = {} if revision is None or Path(base).is_dir() else {"revision": str(revision)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **pinned)
        model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **pinned)
    except OSError as error:
        raise OSError(
            f"the base {base!r} of this adapter is neither a folder nor at hand from the hub; "
            "give it as mlflow.pyfunc.load_model(uri, model_config={'base_model': FOLDER})"
        ) from error
    adapted = PeftModel(model, PeftConfig.from_pretrained(path, inference_mode=True))
    # not `from_pretrained`, which warns at most and answers as the bare base where weights and modules do not meet
    names = {**PLAIN_NAMES, **getattr(model, "_checkpoint_conversion_mapping", {})}  # as `from_pretrained` has it
    outcome = adapted.load_adapter(path, adapter_name=adapted.active_adapter, key_mapping=names)
    if keys := [*outcome.missing_keys, *outcome.unexpected_keys]:
        raise ValueError(
            f"the adapter does not fit the base {base!r}: {len(keys)} tensors do not meet, first {keys[0]}; give the "
            "base that it was trained on as mlflow.pyfunc.load_model(uri, model_config={'base_model': FOLDER})"
        )
    return AdapterModel(adapted.eval(), tokenizer, max_new_tokens=int(config["max_new_tokens"]))


def _prompts(given: Any) -> list[str]:
    """The prompts of what `predict` takes, and of what MLflow's server makes of JSON: a list, an array or a mapping."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping) or hasattr(given, "columns"):
        columns = list(given)
        if PROMPT_COLUMN not in columns and len(columns) != 1:
            raise ValueError(f"a table of prompts needs the column {PROMPT_COLUMN!r} or one column, it has {columns}")
        return _prompts(given[PROMPT_COLUMN if PROMPT_COLUMN in columns else columns[0]])
    return [prompt for each in given for prompt in (_prompts(each) if isinstance(each, Mapping) else [_text(each)])]


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is text, this one is of the type {type(prompt).__name__}")
    return prompt
