"""What of LoHa and LoKr is converted, what is refused and by which name; and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import JSON, broken_bytes, false_headers
from peft import LoHaConfig, LoKrConfig
from safetensors.numpy import load_file, save_file
from tiny import write_tiny_lycoris

from adapterctl.registry.domain.errors import Conflict, InvalidAdapter, InvalidInput, Problem, Refused
from adapterctl.registry.domain.lycoris import LYCORIS_ROLES
from adapterctl.registry.services.convert import convert
from adapterctl.registry.services.register import CONFIG_FILE, WEIGHTS_FILE, inspect

DOCS = Path(__file__).parents[2] / "docs/intake.md"
FUZZED = 200
PATIENCE_S = 5.0
LAYER = "model.layers.0.self_attn.q_proj"
LOHA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}
LOKR = {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}
SPLIT = {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 9), "lokr_w2": (4, 5)}
CORE = {"hada_w1_a": (2, 8), "hada_w1_b": (2, 6), "hada_w2_a": (2, 8), "hada_w2_b": (2, 6)}


def loha(changes: Mapping[str, Any] = {}, *, base: Mapping[str, Any] = LOHA, **options: Any) -> Callable[[Path], Path]:
    """A folder with these tensors changed or, by None, left out."""
    return _written("loha", {**base, **changes}, options)


def lokr(changes: Mapping[str, Any] = {}, *, base: Mapping[str, Any] = LOKR, **options: Any) -> Callable[[Path], Path]:
    return _written("lokr", {**base, **changes}, options)


def _written(method: str, shapes: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[[Path], Path]:
    tensors = {f"{LAYER}.{key}": shape for key, shape in shapes.items() if shape is not None}
    return lambda folder: write_tiny_lycoris(folder, tensors, method=method, **options)


def config(**fields: Any) -> dict[str, Any]:
    return {"config": fields}


def core(height: int, width: int, **options: Any) -> Callable[[Path], Path]:
    cores = {"hada_t1": (2, 2, height, width), "hada_t2": (2, 2, height, width)}
    return loha(cores, base=CORE, **{"config": {"use_effective_conv2d": True}, **options})


def extra(key: str, *values: float, dtype: type = np.float32) -> dict[str, Any]:
    return {"extra": {f"base_model.model.{key}": np.array([values], dtype)}}


BAD = {
    "plain LoRA": (loha(**config(peft_type="LORA")), "not_convertible"),
    "another kind": (loha(**config(peft_type="OFT")), "not_convertible"),
    "no kind": (loha(**config(peft_type=["LOHA"])), "not_convertible"),
    "a field of LyCORIS alone": (loha(**config(use_scalar=True)), "unknown_field"),
    "a field of LoKr in LoHa": (loha(**config(decompose_both=True)), "unknown_field"),
    "a field of LoRA": (lokr(**config(use_rslora=True)), "unknown_field"),
    "DoRA's": (lokr(**config(use_dora=True)), "unknown_field"),
    "whole modules": (loha(**config(modules_to_save=["lm_head"])), "modules_to_save"),
    "rank 0": (loha(**config(r=0)), "bad_rank"),
    "rank beyond any meaning": (lokr(**config(r=10**7)), "bad_rank"),
    "alpha 0": (loha(**config(alpha=0)), "bad_alpha"),
    "look-around in a pattern": (loha(**config(rank_pattern={"(?=q)q_proj": 2})), "bad_pattern"),
    "no targets": (loha(**config(target_modules=None)), "no_targets"),
    "another target": (loha(**config(target_modules=["v_proj"])), "not_targeted"),
    "a tensor is missing": (loha({"hada_w2_b": None}), "incomplete_module"),
    "one core of two": (loha({"hada_t1": (2, 2, 3, 3)}, base=CORE), "incomplete_module"),
    "no second factor": (lokr({"lokr_w2_a": None, "lokr_w2_b": None}), "incomplete_module"),
    "half of a second factor": (lokr({"lokr_w2_a": None}), "incomplete_module"),
    "a factor whole and split": (lokr({"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3)}), "incomplete_module"),
    "a core beside a whole factor": (lokr({"lokr_t2": (2, 2, 3, 3)}, base=SPLIT), "incomplete_module"),
    "cores that the config does not know": (core(3, 3, config={}), "unexpected_tensors"),
    "a split factor that the config does not know": (lokr(base=SPLIT), "unexpected_tensors"),
    "rows differ": (loha({"hada_w2_a": (7, 2)}), "shape_mismatch"),
    "columns differ": (loha({"hada_w2_b": (2, 7)}), "shape_mismatch"),
    "too many axes": (loha({"hada_w2_b": (2, 6, 1)}), "shape_mismatch"),
    "a factor of one axis": (lokr({"lokr_w1": (6,)}), "shape_mismatch"),
    "kernels differ": (
        core(3, 3)
        and loha({"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 4)}, base=CORE, **config(use_effective_conv2d=True)),
        "shape_mismatch",
    ),
    "another rank than the config's": (loha(**config(r=3)), "rank_mismatch"),
    "another rank by a pattern": (lokr(**config(rank_pattern={"q_proj": 3})), "rank_mismatch"),
    "a core of another rank": (core(3, 3, config={"use_effective_conv2d": True, "r": 3}), "rank_mismatch"),
    "one dimension or two": (core(3, 1), "kernel_unknown"),
    "a tensor of LoRA": (loha(**extra(f"{LAYER}.lora_A.weight", 1)), "unknown_tensors"),
    "a tensor of the other method": (loha(**extra(f"{LAYER}.lokr_w1", 1)), "unknown_tensors"),
    "a weight of the base": (loha(**extra("lm_head.weight", 1)), "unknown_tensors"),
    "a bias": (loha(**extra(f"{LAYER}.bias", 1)), "unknown_tensors"),
    "two adapters": (loha(**extra("q_proj.hada_w1_a.other", 1)), "several_adapters"),
    "a tensor twice": (loha(**extra(f"{LAYER}.hada_w1_a.default", 1)), "duplicate_tensor"),
    "no tensors": (loha(base={}), "no_tensors"),
    "whole numbers": (loha({"hada_w1_a": None}, **extra(f"{LAYER}.hada_w1_a", 1, dtype=np.int64)), "bad_dtype"),
    "a product without end": (lokr({"lokr_w1": (70_000, 1), "lokr_w2": (70_000, 1)}, base={}), "too_large"),
    "NaN": (lokr({"lokr_w1": None}, **extra(f"{LAYER}.lokr_w1", 1, float("nan"))), "not_finite"),
    "infinity": (lokr({"lokr_w1": None}, **extra(f"{LAYER}.lokr_w1", 1, float("inf"))), "not_finite"),
    "beyond any training": (lokr({"lokr_w1": None}, **extra(f"{LAYER}.lokr_w1", 1e16, dtype=np.float64)), "too_large"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_converted_is_refused_by_name_and_leaves_nothing_behind(case: str, tmp_path: Path):
    write, code = BAD[case]
    folder = write(tmp_path / "source")

    with pytest.raises(InvalidAdapter) as caught:
        convert(folder, tmp_path / "out")

    assert code in {problem.code for problem in caught.value.problems}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


ACCEPTED = {
    "loha": (loha(), 4),
    "loha of a named adapter": (_written("loha", {f"{key}.default": LOHA[key] for key in LOHA}, {}), 4),
    "loha with a rank by a pattern": (loha(**config(r=7, rank_pattern={"q_proj": 2})), 4),
    "loha with unknown fields that are null": (loha(**config(use_scalar=None)), 4),
    "lokr": (lokr(), 4),
    "lokr, split": (lokr(base=SPLIT, **config(decompose_both=True)), 8),
    "lokr of a rank that no factor has": (lokr({"lokr_w2": (4, 5)}, base={"lokr_w1": (2, 3)}, **config(r=10**5)), 8),
    "two dimensions": (core(3, 3), 4),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_converted_is_taken_by_the_intake_at_its_exact_rank(case: str, tmp_path: Path):
    write, rank = ACCEPTED[case]

    made = convert(write(tmp_path / "source"), tmp_path / "out")

    assert inspect(tmp_path / "out").max_rank == made.rank == rank


def test_a_rank_pattern_of_two_ranks_gives_one_rank_and_zeros(tmp_path: Path):
    tensors = {f"{LAYER}.{key}": shape for key, shape in LOHA.items()}
    tensors |= {f"other.q_proj.{key}": tuple(1 if n == 2 else n for n in shape) for key, shape in LOHA.items()}
    folder = write_tiny_lycoris(tmp_path / "source", tensors, config={"rank_pattern": {"other.q_proj": 1}})

    made = convert(folder, tmp_path / "out")

    assert {each.module: each.exact_rank for each in made.modules} == {LAYER: 4, "other.q_proj": 1}
    assert {module.rank for module in inspect(tmp_path / "out").modules} == {4}


KERNELS = {
    "no divisor of the columns": (loha(), {"q_proj": (5,)}),
    "on a whole factor of a linear layer": (lokr({"lokr_w2": (4, 5)}, base={"lokr_w1": (2, 3)}), {"q_proj": (5,)}),
    "other than the file's": (core(3, 3), {"q_proj": (3,)}),
    "neither of two that the file leaves open": (core(3, 1), {"q_proj": (1, 3)}),
}


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_that_contradicts_the_file_is_refused(case: str, tmp_path: Path):
    write, kernels = KERNELS[case]

    with pytest.raises(InvalidAdapter, match="kernel") as caught:
        convert(write(tmp_path / "source"), tmp_path / "out", kernels=kernels)

    assert {problem.code for problem in caught.value.problems} == {"shape_mismatch"}


@pytest.mark.parametrize(
    ("write", "kernel", "shape"),
    [
        (loha(), (3,), (2, 3)),
        (loha(), (3, 2), (1, 3, 2)),
        (loha(), (1, 1), (6, 1, 1)),
        (lokr(), (5,), (3, 5)),
        (core(3, 1), (3,), (6, 3)),
        (core(3, 1), (3, 1), (6, 3, 1)),
    ],
)
def test_a_kernel_that_is_given_shapes_the_factors(write: Any, kernel: Any, shape: Any, tmp_path: Path):
    convert(write(tmp_path / "source"), tmp_path / "out", kernels={"self_attn.q_proj": kernel})

    (module,) = inspect(tmp_path / "out").modules
    assert module.kind == "conv"
    assert module.a.shape == (module.rank, *shape)
    assert module.b.shape == (8, module.rank, *(1 for _ in kernel))


def test_a_kernel_for_no_module_is_an_error_of_usage(tmp_path: Path):
    with pytest.raises(InvalidInput, match="'proj'") as caught:
        convert(loha()(tmp_path / "source"), tmp_path / "out", kernels={"proj": (3,)})

    assert LAYER in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [{"kernels": {"c": (0,)}}, {"kernels": {"c": (-1, 3)}}, {"kernels": {"c": ()}}, {"dtype": "f32"}, {"rank": 0}],
)
def test_options_that_are_none_are_errors_of_usage(options: Any, tmp_path: Path):
    folder = loha()(tmp_path / "source")

    with pytest.raises(InvalidInput) as caught:
        convert(folder, tmp_path / "out", **options)

    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_rank_beyond_the_intake_is_refused_unless_it_is_cut(tmp_path: Path):
    folder = lokr({"lokr_w1": (70, 70), "lokr_w2": (70, 70)}, base={})(tmp_path / "source")

    with pytest.raises(Refused, match="rank 4,900") as caught:
        convert(folder, tmp_path / "out")

    assert "--rank" in caught.value.hint
    assert convert(folder, tmp_path / "out", rank=8).rank == 8


def test_what_float16_cannot_hold_is_refused(tmp_path: Path):
    folder = lokr({"lokr_w1": None}, **extra(f"{LAYER}.lokr_w1", 1e6))(tmp_path / "source")

    with pytest.raises(Refused, match="F16"):
        convert(folder, tmp_path / "out", dtype="F16")

    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert convert(folder, tmp_path / "out", dtype="BF16").loss < 0.005


@pytest.mark.parametrize(("dtype", "size", "larger"), [("F16", 1e-3, "f32"), ("F32", 1e-23, "f64")])
def test_what_would_be_lost_because_it_is_small_is_refused(dtype: str, size: float, larger: str, tmp_path: Path):
    folder = small(tmp_path / "source", size)

    with pytest.raises(Refused, match=f"so small that {dtype} loses") as caught:
        convert(folder, tmp_path / "out", dtype=dtype)

    assert larger in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert convert(folder, tmp_path / "out", dtype=larger.upper()).loss < 1e-6


def small(folder: Path, size: float) -> Path:
    loha()(folder)
    tensors = {key: value * np.float32(size) for key, value in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path):
    folder = loha()(tmp_path / "source")

    with pytest.raises(Conflict):
        convert(folder, folder)

    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path):
    folder = loha()(tmp_path / "source")
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-4])

    with pytest.raises(InvalidAdapter) as caught:
        convert(folder, tmp_path / "out")

    assert [problem.code for problem in caught.value.problems] == ["truncated"]


@pytest.mark.parametrize(("method", "kind"), [("loha", LoHaConfig), ("lokr", LoKrConfig)])
def test_every_field_of_peft_has_its_role_and_its_row_in_the_docs(method: Any, kind: Any):
    section = DOCS.read_text(encoding="utf-8").partition("## LoHa and LoKr")[2].partition("\n## ")[0]

    assert {each.name for each in fields(kind)} == LYCORIS_ROLES[method].keys()
    assert [name for name in LYCORIS_ROLES[method] if f"`{name}`" not in section] == []


@dataclass(frozen=True)
class Fuzzed:
    """A valid adapter in memory, and a folder where what became of it is tried."""

    root: Path
    config: Mapping[str, Any]
    weights: bytes

    def check(self, config: Mapping[str, Any], weights: bytes) -> None:
        """It is refused with its problems, or what comes out is an adapter; quickly, and nothing else is left."""
        source, out = self.root / "source", self.root / "out"
        (source / CONFIG_FILE).write_text(json.dumps(config))
        (source / WEIGHTS_FILE).write_bytes(weights)
        began = time.perf_counter()

        problems = self._problems(source, out)

        assert problems is None or problems

        assert time.perf_counter() - began < PATIENCE_S
        assert [path.name for path in self.root.iterdir()] == ["source"]

    def _problems(self, source: Path, out: Path) -> Sequence[Problem] | None:
        """Of the refusal; None where it was converted. Any other error fails the test."""
        try:
            made = convert(source, out, rank=3)
        except InvalidAdapter as refusal:
            return refusal.problems
        except Refused as refusal:  # too large for float32
            return [Problem("refused", refusal.message)]
        assert inspect(out).max_rank == made.rank
        assert made.loss >= 0
        shutil.rmtree(out)
        return None


@pytest.fixture(scope="module", params=["loha", "lokr"])
def fuzzed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fuzzed:
    root = tmp_path_factory.mktemp("fuzz")
    folder = write_tiny_lycoris(root / "source", method=request.param)
    return Fuzzed(root, json.loads((folder / CONFIG_FILE).read_text()), (folder / WEIGHTS_FILE).read_bytes())


NAMES = [
    "__metadata__",
    "lm_head.weight",
    f"base_model.model.{LAYER}.hada_t1",
    f"base_model.model.{LAYER}.hada_w1_a.default",
    f"base_model.model.{LAYER}.lokr_w1_a",
    f"base_model.model.{LAYER}.lokr_w2",
    f"base_model.model.{LAYER}.lora_A.weight",
    "base_model.model.other.q_proj.lokr_w1",
    "base_model.model..hada_w1_a",
    "../x",
]


@settings(max_examples=FUZZED, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_mutated_file_crashes_or_hangs_the_conversion(fuzzed: Fuzzed, data: st.DataObject):
    fuzzed.check(fuzzed.config, data.draw(broken_bytes(fuzzed.weights) | false_headers(fuzzed.weights, NAMES)))


@settings(max_examples=FUZZED, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(sorted(LYCORIS_ROLES["lokr"])), JSON, min_size=1, max_size=4))
def test_no_config_crashes_the_conversion(fuzzed: Fuzzed, changes: Mapping[str, Any]):
    fuzzed.check({**fuzzed.config, **changes}, fuzzed.weights)
