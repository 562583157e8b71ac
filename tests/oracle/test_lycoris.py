"""LoHa and LoKr adapters that PEFT made, written as LoRA: PEFT must say the same with either, on the same base.

Deltas are held against `get_delta_weight` in float64, to 1e-12; outputs to the rounding of a float32 model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from peft.tuners.lora import save_as_lora
from peft.tuners.lycoris_utils import LycorisLayer
from tiny_merge import deltas, distance

from adapterctl.registry.services.convert import convert
from adapterctl.registry.services.register import inspect

ATTENTION = ["q_proj", "v_proj"]
#: Of a float32 model (seen: up to 5e-7), and of deltas in float64.
OUTPUT, DELTA = 1e-5, 1e-12


@dataclass(frozen=True)
class Setup:
    """One adapter, as keyword arguments of its config; `kernels` are those that its file does not tell."""

    kind: type
    config: dict[str, Any]
    base: str = "llama"
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)


def loha(base: str = "llama", kernels: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Setup:
    return Setup(LoHaConfig, {"target_modules": ATTENTION, **config}, base, kernels or {})


def lokr(base: str = "llama", kernels: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Setup:
    return Setup(LoKrConfig, {"target_modules": ATTENTION, **config}, base, kernels or {})


BOTH = ["first", "second"]
PATTERNS = {"rank_pattern": {"v_proj": 2, r"layers\.1.*q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}}
SETUPS = {
    "loha": loha(),
    "loha of rank 1": loha(r=1, alpha=3),
    "loha above the width": loha(r=7),
    "loha far above the width": loha(r=40, alpha=10),
    "loha on everything": loha(target_modules="all-linear"),
    "loha in one layer": loha(layers_to_transform=[1], layers_pattern="layers"),
    "loha but for some": loha(exclude_modules=["layers.0.self_attn.q_proj"]),
    "loha by a pattern": loha(target_modules=r".*layers\.1.*(q|k)_proj"),
    "loha with patterns": loha(**PATTERNS),
    "loha with a negative alpha": loha(alpha=-4),
    "loha with dropout": loha(rank_dropout=0.5, module_dropout=0.5, init_weights=False),
    "loha conv1d, flat": loha("conv1d", {"first": (3,), "second": (1,)}, target_modules=BOTH),
    "loha conv2d, flat": loha("conv2d", {"first": (3, 3), "second": (1, 1)}, target_modules=BOTH),
    "loha conv1d, effective": loha(
        "conv1d", {"first": (3,), "second": (1,)}, target_modules=BOTH, use_effective_conv2d=True
    ),
    "loha conv2d, effective": loha("conv2d", {"second": (1, 1)}, target_modules=BOTH, use_effective_conv2d=True),
    "lokr": lokr(),
    "lokr, whole factors": lokr(r=100_000, alpha=100_000),
    "lokr, small blocks": lokr(decompose_factor=2, r=2),
    "lokr, large blocks": lokr(decompose_factor=8, r=1),
    "lokr, both decomposed": lokr(decompose_both=True, r=2, decompose_factor=8),
    "lokr, both decomposed at rank 1": lokr(decompose_both=True, r=1),
    "lokr on everything": lokr(target_modules="all-linear", decompose_factor=4),
    "lokr with patterns": lokr(**PATTERNS),
    "lokr in LyCORIS's start": lokr(init_weights="lycoris", rank_dropout=0.3, rank_dropout_scale=True),
    "lokr conv1d, whole": lokr("conv1d", target_modules=BOTH),
    "lokr conv1d, flat": lokr("conv1d", {"first": (3,)}, target_modules=["first"], r=1, decompose_factor=2),
    "lokr conv2d, whole": lokr("conv2d", target_modules=BOTH),
    "lokr conv2d, flat": lokr("conv2d", {"first": (3, 3)}, target_modules=["first"], r=1, decompose_factor=2),
    "lokr conv2d, effective": lokr(
        "conv2d", target_modules=["first"], r=1, decompose_factor=2, use_effective_conv2d=True
    ),
    "lokr conv2d, both and effective": lokr(
        "conv2d",
        target_modules=["first"],
        r=1,
        alpha=50,
        decompose_factor=4,
        decompose_both=True,
        use_effective_conv2d=True,
    ),
}


@pytest.fixture(params=list(SETUPS))
def setup(request: pytest.FixtureRequest) -> Setup:
    return SETUPS[request.param]


@pytest.fixture
def float64_scalars() -> Iterator[None]:
    """LoHa of PEFT 0.21 makes a tensor of its scaling, which is float32 by default: 6e-8 beside the truth."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def save(setup: Setup, bench: Any, folder: Path, **options: Any) -> Path:
    return bench.save_adapter(setup.base, folder, seed=1, kind=setup.kind, **{**setup.config, **options})


def relative(one: Any, other: Any) -> float:
    return float(torch.linalg.norm(one - other) / torch.linalg.norm(other))


def test_the_base_says_the_same_with_either(setup: Setup, bench: Any, tmp_path: Path):
    source = save(setup, bench, tmp_path / "source")
    expected, _ = bench.merged(setup.base, source)

    made = convert(source, tmp_path / "lora", kernels=setup.kernels)

    output, modules = bench.merged(setup.base, tmp_path / "lora")
    assert modules == {module.module for module in made.modules}
    assert relative(output, expected) <= OUTPUT
    assert relative(bench.plain(setup.base), expected) > 100 * OUTPUT, "the adapter changes nothing: no test"
    assert made.loss <= 1e-7
    assert made.cut_loss == 0


def test_every_delta_is_that_of_peft_in_float64(setup: Setup, bench: Any, tmp_path: Path, float64_scalars: None):
    source = save(setup, bench, tmp_path / "source", dtype=torch.float64)
    peft = PeftModel.from_pretrained(bench.base(setup.base), str(source), autocast_adapter_dtype=False)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peft.named_modules()
        if isinstance(layer, LycorisLayer)
    }

    made = convert(source, tmp_path / "lora", kernels=setup.kernels)

    found = deltas(tmp_path / "lora")
    assert made.dtype == "F64"
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        delta = layer.double().get_delta_weight("default").detach().numpy()
        assert np.abs(found[name] - delta.reshape(len(delta), -1)).max() <= DELTA * np.abs(delta).max(), name


def test_one_dimension_in_effective_form_is_the_kernel_that_is_said(bench: Any, tmp_path: Path):
    # torch.kron refuses what PEFT 0.21 gives it at rank 1, so this one has a rank of 2 and wider channels than most
    options = {"target_modules": ["first"], "use_effective_conv2d": True, "decompose_factor": 1, "r": 2}
    source = bench.save_adapter("conv1d", tmp_path / "source", seed=1, kind=LoKrConfig, **options)
    expected, _ = bench.merged("conv1d", source)

    convert(source, tmp_path / "lora", kernels={"first": (3,)})

    assert relative(bench.merged("conv1d", tmp_path / "lora")[0], expected) <= OUTPUT


def test_peft_loads_no_convolution_whose_kernel_was_forgotten(bench: Any, tmp_path: Path):
    source = save(SETUPS["loha conv2d, flat"], bench, tmp_path / "source")

    convert(source, tmp_path / "lora")

    with pytest.raises(RuntimeError, match="size mismatch"):
        bench.merged("conv2d", tmp_path / "lora")


def test_peft_loads_no_grouped_convolution(tmp_path: Path):
    grouped = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2))
    config = LoHaConfig(target_modules=["0"], r=2, use_effective_conv2d=True, init_weights=False)
    get_peft_model(copy.deepcopy(grouped), config).save_pretrained(str(tmp_path / "source"))

    convert(tmp_path / "source", tmp_path / "lora")

    with pytest.warns(UserWarning, match="groups"), pytest.raises((RuntimeError, ValueError)):
        PeftModel.from_pretrained(grouped, str(tmp_path / "lora"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_half_precision_becomes_float32_without_any_loss(kind: type, dtype: torch.dtype, bench: Any, tmp_path: Path):
    source = bench.save_adapter("llama", tmp_path / "s", seed=1, dtype=dtype, kind=kind, target_modules=ATTENTION)

    made = convert(source, tmp_path / "lora")

    assert made.dtype == "F32"
    assert made.loss == 0


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_cut_is_the_float64_optimum_and_its_loss_is_told(kind: type, dtype: str, bench: Any, tmp_path: Path):
    source = bench.save_adapter("llama", tmp_path / "source", seed=1, kind=kind, target_modules=ATTENTION)
    convert(source, tmp_path / "exact", dtype="F64")

    made = convert(source, tmp_path / "cut", rank=5, dtype=dtype)

    exact, found = deltas(tmp_path / "exact"), deltas(tmp_path / "cut")
    lost = {name: float(np.sum((found[name] - delta) ** 2)) for name, delta in exact.items()}
    size = {name: float(np.sum(delta**2)) for name, delta in exact.items()}
    least = sum(float(np.sum(np.linalg.svd(d, compute_uv=False)[5:] ** 2)) for d in exact.values())
    assert made.rank == 5
    assert made.cut_loss == pytest.approx((least / sum(size.values())) ** 0.5, rel=1e-6)
    assert made.loss == pytest.approx((sum(lost.values()) / sum(size.values())) ** 0.5, rel=1e-4)
    assert {each.module: each.loss for each in made.modules} == pytest.approx(
        {name: (lost[name] / size[name]) ** 0.5 for name in exact}, rel=1e-4
    )


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_peft_converts_to_the_same_delta_at_the_same_rank(kind: type, bench: Any, tmp_path: Path):
    source = bench.save_adapter("llama", tmp_path / "source", seed=1, kind=kind, target_modules=ATTENTION)
    save_as_lora(tmp_path / "peft", PeftModel.from_pretrained(bench.base("llama"), str(source)), rank=5)

    convert(source, tmp_path / "ours", rank=5)

    # PEFT's is an SVD in float32
    assert distance(deltas(tmp_path / "ours"), deltas(tmp_path / "peft")) <= 1e-5


def test_what_is_written_leaves_nothing_to_resolve(bench: Any, tmp_path: Path):
    source = save(SETUPS["loha with patterns"], bench, tmp_path / "source", task_type="CAUSAL_LM", revision="abc")

    convert(source, tmp_path / "lora")

    facts = inspect(tmp_path / "lora")
    assert {module.scaling for module in facts.modules} == {1.0}
    assert {module.rank for module in facts.modules} == {16}
    assert facts.config["target_modules"] == ATTENTION
    assert (facts.task_type, facts.base_revision) == ("CAUSAL_LM", "abc")
    assert [facts.config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern")] == [False, {}, {}]


def test_the_same_files_give_the_same_bytes(bench: Any, tmp_path: Path):
    source = save(SETUPS["lokr"], bench, tmp_path / "source")

    for folder in ("one", "two"):
        convert(source, tmp_path / folder, rank=3, dtype="BF16")

    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 3
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
