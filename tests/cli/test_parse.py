"""What people type, as values; and that what is not understood says how to write it."""

from __future__ import annotations

import pytest

from adapterctl.cli import parse
from adapterctl.registry.domain.errors import InvalidInput


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (None, None)])
def test_durations(text: str | None, seconds: float | None):
    assert parse.duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1.5 h", "1w", "infs", "1e9h"])
def test_other_durations_are_refused(text: str):
    with pytest.raises(InvalidInput, match="duration"):
        parse.duration_s(text)


def test_pairs_keep_everything_behind_the_first_equals_sign():
    assert parse.pairs(["a=1", "url=http://x/?y=z", "empty="], option="--tag") == {
        "a": "1", "url": "http://x/?y=z", "empty": "",
    }  # fmt: skip


@pytest.mark.parametrize("texts", [["a"], ["=1"], ["a=1", "a=2"]])
def test_pairs_that_are_none_or_contradict_are_refused(texts: list[str]):
    with pytest.raises(InvalidInput):
        parse.pairs(texts, option="--tag")


@pytest.mark.parametrize("text", ["bleu=high", "bleu=nan", "bleu=inf", "bleu="])
def test_metrics_are_finite_numbers(text: str):
    with pytest.raises(InvalidInput, match="not a finite number"):
        parse.metrics([text])


def test_options_are_read_by_how_they_look():
    assert parse.options(["density=0.5", "k=3", "sign=true", "mode=total"]) == {
        "density": 0.5, "k": 3, "sign": True, "mode": "total",
    }  # fmt: skip


def test_weights_belong_to_parents_in_order():
    named = parse.parents(["translate:v3=0.5", "chat:v5"], None)
    listed = parse.parents(["translate:v3", "chat:v5"], "0.5,1")

    assert [(str(p.ref), p.weight) for p in named] == [("translate:v3", 0.5), ("chat:v5", 1.0)]
    assert listed == named


@pytest.mark.parametrize(("texts", "weights"), [(["a=1", "b"], "1,2"), (["a", "b"], "1"), (["a", "b"], "1,x")])
def test_weights_that_are_unclear_are_refused(texts: list[str], weights: str):
    with pytest.raises(InvalidInput):
        parse.parents(texts, weights)


@pytest.mark.parametrize(("text", "name"), [("bf16", "BF16"), ("F32", "F32"), ("f64", "F64"), (None, None)])
def test_dtypes_become_safetensors_names(text: str | None, name: str | None):
    assert parse.dtype(text) == name


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InvalidInput, match="int8"):
        parse.dtype("int8")
