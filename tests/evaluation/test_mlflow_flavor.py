"""A version, loaded by the tools that people use: PEFT from MLflow's download, and MLflow's pyfunc."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
import torch
from peft import PeftModel
from tiny import carrying
from transformers import AutoTokenizer, LlamaForCausalLM

from adapterctl.mlflow_flavor import _load_pyfunc
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.services.pull import damage
from adapterctl.registry.services.register import Registration, register
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.stores.mlflow_server import embedded_uri

# MLflow's own types, when mlflow.pyfunc is imported
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

PROMPTS = ["un chat ->", "la porte est ouverte ->"]


@pytest.fixture
def published(sql_ledger, version_store, tiny_adapters, tiny_base, home) -> Iterator[Any]:
    """The first tiny adapter as chat:v1 in production, and MLflow's global functions set to that registry."""
    register(
        sql_ledger,
        Registration(source=str(tiny_adapters[0]), name="chat", base=str(tiny_base)),
        open_versions=lambda: version_store,
        open_hub=lambda source, wanted: pytest.fail("nothing here comes from a hub"),
        home=home,
        created_by="ada",
    )
    version_store.project_stage("chat", "production", number=1, legacy={1: "Production"})
    mlflow.set_tracking_uri(embedded_uri(home))
    mlflow.set_registry_uri(embedded_uri(home))
    yield resolve(sql_ledger, Ref("chat", number=1))
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture
def expected(tiny_base: Path, tiny_adapters: tuple[Path, Path]) -> list[str]:
    """What PEFT answers with the files that were registered."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base), tiny_adapters[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    answers = []
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**encoded, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answers.append(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_peft_loads_what_mlflow_downloads_by_stage(published, tiny_base, tiny_adapters):
    folder = mlflow.artifacts.download_artifacts("models:/chat@production")

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base), folder)

    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base), tiny_adapters[0])
    stored, original = model.state_dict(), reference.state_dict()
    assert all(torch.equal(stored[key], original[key]) for key in original)
    assert any("lora_A" in key for key in original)


def test_a_version_that_mlflow_has_loaded_is_still_what_its_manifest_says(published):
    folder = Path(mlflow.artifacts.download_artifacts("models:/chat@production"))

    assert (folder / "registered_model_meta").is_file()
    assert damage(folder, published.placement.files) == []


@pytest.mark.parametrize(
    "given",
    [
        PROMPTS,
        pandas.DataFrame({"prompt": PROMPTS, "id": [1, 2]}),
        pandas.DataFrame({"text": PROMPTS}),
        [{"prompt": prompt, "id": 1} for prompt in PROMPTS],
    ],
    ids=["list", "table", "one column", "rows"],
)
def test_pyfunc_answers_prompts_as_peft_does(given, published, expected):
    model = mlflow.pyfunc.load_model("models:/chat@production", model_config={"max_new_tokens": 12})

    assert model.predict(given) == expected


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": PROMPTS},
        {"inputs": {"prompt": PROMPTS}},
        {"instances": [{"text": prompt} for prompt in PROMPTS]},
        {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]}},
    ],
    ids=lambda body: f"{next(iter(body))} as {type(next(iter(body.values()))).__name__}",
)
def test_mlflows_server_may_be_asked_by_every_body_that_it_takes(body, published, expected):
    from mlflow.pyfunc.scoring_server import infer_and_parse_data  # deferred: it warns when it is imported

    model = mlflow.pyfunc.load_model("models:/chat@production", model_config={"max_new_tokens": 12})

    assert model.predict(infer_and_parse_data(body)) == expected


def test_an_answer_is_as_long_as_is_asked_for(published, expected):
    from mlflow.pyfunc.scoring_server import _parse_json_data  # deferred: it warns when it is imported

    model = mlflow.pyfunc.load_model("models:/chat@production", model_config={"max_new_tokens": 12})

    asked = model.predict(PROMPTS, params={"max_new_tokens": 3})

    assert all(
        answer.startswith(short) and len(short) < len(answer) for short, answer in zip(asked, expected, strict=True)
    )
    served = _parse_json_data({"inputs": PROMPTS, "params": {"max_new_tokens": 3}}, model.metadata, None)
    assert model.predict(served.data, params=served.params) == asked
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected at least 1"):
        model.predict(PROMPTS, params={"max_new_tokens": 0})


def test_names_with_an_adapter_name_in_them_are_loaded_too(tiny_base, tiny_adapters, tmp_path, expected):
    folder = carrying("mine", tiny_adapters[0], tmp_path / "named")

    model = _load_pyfunc(str(folder), {"base_model": str(tiny_base), "max_new_tokens": 12})

    assert model.predict(PROMPTS) == expected


def test_an_adapter_that_does_not_fit_the_base_never_answers_as_the_bare_base(published, tiny_base, tmp_path):
    shallow = LlamaForCausalLM.from_pretrained(tiny_base, num_hidden_layers=1)
    shallow.save_pretrained(tmp_path / "shallow")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "shallow")

    with pytest.raises(ValueError, match=r"does not fit the base .*shallow.* first .*layers\.1\."):
        mlflow.pyfunc.load_model("models:/chat/1", model_config={"base_model": str(tmp_path / "shallow")})


def test_the_base_may_be_given_as_a_folder(published, tiny_base, tmp_path, expected):
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_base)

    model = mlflow.pyfunc.load_model("models:/chat/1", model_config={"base_model": str(moved), "max_new_tokens": 12})

    assert model.predict(PROMPTS[:1]) == expected[:1]


def test_a_base_that_is_not_there_is_named_with_the_way_out(published):
    with pytest.raises(OSError, match="model_config") as error:
        mlflow.pyfunc.load_model("models:/chat/1", model_config={"base_model": "nowhere/at-all"})

    assert "'nowhere/at-all'" in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (pandas.DataFrame({"a": ["x"], "b": ["y"]}), "needs the column 'prompt'"),
        ([["x"]], "is of the type list"),
        (["x", ""], "the prompt '' has no tokens"),
    ],
    ids=["no prompts", "no texts", "an empty text"],
)
def test_what_holds_no_prompts_is_refused(published, given, said):
    model = mlflow.pyfunc.load_model("models:/chat/1")

    with pytest.raises(ValueError, match=said):
        model.predict(given)


def test_without_the_extra_the_missing_package_and_the_remedy_are_named(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(ImportError, match=r"pip install 'adapterctl\[eval\]'"):
        mlflow.pyfunc.load_model("models:/chat/1")


def test_mlflow_knows_the_flavors_of_a_version(published):
    info = mlflow.models.get_model_info("models:/chat/1")

    assert sorted(info.flavors) == ["peft", "python_function"]
    assert info.metadata["adapterctl"]["content_digest"] == published.spec.content_digest
