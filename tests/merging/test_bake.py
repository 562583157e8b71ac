"""The kernel of baking: float64 rounded once, at ties, at both ends of the range, and for every kind of module."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny import safetensors_bytes, write_tiny_adapter
from tiny_merge import facts_of

from adapterctl.registry.domain.bake_plan import BakePlan, BaseTensor, plan_bake
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.merging import bake as kernel
from adapterctl.registry.merging.bake import bake
from adapterctl.registry.merging.tensors import STORED, round_once, widen

BITS = {"BF16": (8, -133, 2.0**128), "F16": (11, -24, 2.0**16), "F32": (24, -149, 2.0**128)}


def exactly(value: float, dtype: str) -> float:
    """To nearest, ties to even, in rational arithmetic. Source: IEEE 754-2019, 4.3.1."""
    precision, smallest, end = BITS[dtype]
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - precision, smallest)
    rounded = round(Fraction(value) / Fraction(2) ** exponent) * Fraction(2) ** exponent  # ties to even, as in Python
    return math.copysign(math.inf if abs(rounded) >= end else float(abs(rounded)), value)


@st.composite
def near_ties(draw: st.DrawFn) -> float:
    """A value that has to be rounded: a short one, half of its last place, and a few last places of float64."""
    precision = draw(st.sampled_from([8, 11, 24]))
    whole = draw(st.integers(0, 2**precision - 1)) + draw(st.sampled_from([0.0, 0.5]))
    value = math.ldexp(whole, draw(st.integers(-160, 128 - precision)))
    for _ in range(draw(st.integers(0, 3))):
        value = math.nextafter(value, draw(st.sampled_from([0.0, math.inf])))
    return draw(st.sampled_from([-1.0, 1.0])) * value


@given(st.lists(near_ties() | st.floats(width=64), min_size=1, max_size=20), st.sampled_from(list(BITS)))
def test_every_value_is_rounded_once_to_nearest_with_ties_to_even(values: list[float], dtype: str):
    out, back = np.empty(len(values), STORED[dtype]), np.empty(len(values))

    with np.errstate(all="ignore"):
        round_once(np.array(values), dtype, out)
        widen(out, dtype, back)

    assert np.array_equal(back, [exactly(value, dtype) for value in values], equal_nan=True)


def test_a_value_that_float32_would_make_a_tie_goes_where_it_belongs():
    above_a_tie = 1 + 2.0**-8 + 2.0**-40
    out = np.empty(1, "<u2")

    round_once(np.array([above_a_tie]), "BF16", out)

    assert out[0] == 0x3F81, "by way of float32 it would be 1.0, the even neighbour"


def test_a_nan_of_any_bits_stays_one():
    out, back = np.empty(4, "<u2"), np.empty(4)

    with np.errstate(invalid="ignore"):  # one of them signals
        values = np.array([0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
        round_once(values.astype(np.float64), "BF16", out)
    widen(out, "BF16", back)

    assert np.isnan(back).all()


def plan_of(base: Path, adapter: Path) -> BakePlan:
    tensors = [BaseTensor(0, entry) for entry in read_header(base).tensors]
    return plan_bake(facts_of(adapter), {"architectures": ["Any"], "model_type": "gpt2"}, tensors)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [64, 4 << 20])
def test_every_kind_of_module_gets_its_delta_in_pieces_and_bands_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, piece: int
):
    monkeypatch.setattr(kernel, "PIECE_BYTES", piece)
    monkeypatch.setattr(kernel, "BAND", piece)
    adapter = write_tiny_adapter(
        tmp_path / "adapter",
        linear={"h.0.square": (12, 12), "h.0.wide": (5, 12), "h.0.conv1d": (24, 12)},
        embedding={"words": (30, 8)},
        conv={"one": (6, 4, 3), "two": (6, 4, 3, 2)},
        rank=3,
    )
    shapes = {
        "h.0.square": (12, 12), "h.0.wide": (5, 12), "h.0.conv1d": (12, 24),
        "words": (30, 8), "one": (6, 4, 3), "two": (6, 4, 3, 2), "other": (7, 3),
    }  # fmt: skip
    random = np.random.default_rng(5)
    weights = {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    base = tmp_path / "base.safetensors"
    base.write_bytes(safetensors_bytes({f"{name}.weight": ("F32", array) for name, array in weights.items()}))
    (tmp_path / "out").mkdir()

    done = bake(
        plan_of(base, adapter),
        adapter / "adapter_model.safetensors",
        [base],
        tmp_path / "out",
        shard_bytes=10**9,
        threads=threads,
        on_progress=lambda done, total: None,
    )

    factors = {key.removeprefix("base_model.model."): value.astype(float) for key, value in _read(adapter).items()}
    made = load_file(tmp_path / "out" / "model.safetensors")
    deltas = {
        "h.0.square": _linear(factors, "h.0.square").T,  # Conv1D, by the architecture
        "h.0.wide": _linear(factors, "h.0.wide"),
        "h.0.conv1d": _linear(factors, "h.0.conv1d").T,
        "words": (factors["words.lora_embedding_B"] @ factors["words.lora_embedding_A"]).T,
        **{name: np.einsum("or,r...->o...", *_conv(factors, name)) for name in ("one", "two")},
        "other": np.zeros((7, 3)),
    }
    exact = {name: weights[name] + 8 / 3 * delta for name, delta in deltas.items()}
    for name, value in exact.items():
        np.testing.assert_array_max_ulp(made[f"{name}.weight"], value.astype(np.float32), maxulp=1)
    assert np.array_equal(made["other.weight"], weights["other"])
    norm = math.sqrt(sum(float(np.sum((8 / 3 * delta) ** 2)) for delta in deltas.values()))
    error = math.sqrt(sum(float(np.sum((made[f"{name}.weight"] - value) ** 2)) for name, value in exact.items()))
    assert done.rounding.delta == pytest.approx(norm)
    assert done.rounding.error == pytest.approx(error, rel=1e-3)


def _read(adapter: Path) -> dict[str, np.ndarray]:
    return load_file(adapter / "adapter_model.safetensors")


def _linear(factors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]


def _conv(factors: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    b, a = factors[f"{name}.lora_B.weight"], factors[f"{name}.lora_A.weight"]
    return b.reshape(b.shape[:2]), a
