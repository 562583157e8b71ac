"""A receipt says what is on the disk: it agrees with dense algebra, and fails for each way that files can be wrong."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import encode, write_tiny_adapter
from tiny_merge import WEIGHTS, deltas, distance, exact_sum, facts_of, plan_of, run_merge, write_factors

from adapterctl.registry.domain.errors import ReceiptFailed
from adapterctl.registry.merging.tensors import TensorReader
from adapterctl.workers import engine, receipt

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    return [write_tiny_adapter(tmp_path / f"p{i}", seed=i, rank=3 + i, alpha=3) for i in range(2)]


@pytest.fixture
def prove_changed(parents: list[Path], tmp_path: Path) -> Callable[..., ReceiptFailed]:
    """Merge, let `change` do something to the folder, and return the failure of the receipt."""

    def run(change: Callable[[Path], None], **ask: object) -> ReceiptFailed:
        plan, out = plan_of(parents, **ask), tmp_path / "out"
        out.mkdir()
        files = [folder / WEIGHTS for folder in parents]
        outcomes = engine.merge(plan, files, out)
        change(out)
        with pytest.raises(ReceiptFailed) as failed:
            receipt.prove(plan, files, out, outcomes)
        shutil.rmtree(out)
        return failed.value

    return run


def write_value(folder: Path, key: str, value: float, place: int = 0) -> None:
    """Put `value` at the float32 number `place` of a tensor; counted from the end where negative."""
    module = next(m for m in facts_of(folder).modules if m.name == MODULE)
    entry = {"A": module.a, "B": module.b}[key]
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek((entry.begin if place >= 0 else entry.end) + 4 * place)
        file.write(np.float32(value).tobytes())


@pytest.mark.parametrize("ask", [{"method": "cat"}, {"method": "svd", "rank": 3}, {"method": "svd", "dtype": "bf16"}])
def test_the_receipt_says_what_dense_algebra_says(parents: list[Path], tmp_path: Path, ask: dict[str, object]):
    weights = (0.8, -0.5)

    merged = run_merge(parents, tmp_path / "out", weights=weights, **ask)

    exact, child = exact_sum(parents, weights), deltas(merged.folder)
    norm = np.sqrt(sum(np.sum(d**2) for d in exact.values()))
    proof = merged.receipt
    assert proof["loss"] == pytest.approx(distance(child, exact), abs=1e-6)
    assert abs(proof["loss"] - proof["predicted_loss"]) <= proof["loss_bound"]
    assert proof["norm"] == pytest.approx(norm, rel=1e-5)
    shares = [0.8 * np.sqrt(sum(np.sum(d**2) for d in deltas(parents[0]).values())) / norm]
    assert proof["parents"][0]["share"] == pytest.approx(shares[0], rel=1e-5)
    flat = [np.concatenate([side[n].ravel() for n in sorted(side)]) for side in (child, deltas(parents[1]))]
    cosine = flat[0] @ -flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert proof["parents"][1]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert proof["fingerprint"]["numpy"] == np.__version__


def test_a_merge_that_keeps_everything_retains_every_parent(parents: list[Path], tmp_path: Path):
    proof = run_merge(parents, tmp_path / "out", method="cat").receipt

    assert [parent["retention"] for parent in proof["parents"]] == [1.0, 1.0]
    assert proof["spectrum"]["energy_at_rank"] == 1.0


def test_every_module_has_its_column(parents: list[Path], tmp_path: Path):
    weights = (0.8, -0.5)

    merged = run_merge(parents, tmp_path / "out", weights=weights, method="svd", rank=2)

    layers, exact, child = merged.receipt["layers"], exact_sum(parents, weights), deltas(merged.folder)
    first, second = (deltas(folder) for folder in parents)
    for place, name in enumerate(layers["module"]):
        norm, sigma = np.linalg.norm(exact[name]), np.linalg.svd(exact[name], compute_uv=False)
        sizes = [0.8 * np.linalg.norm(first[name]), 0.5 * np.linalg.norm(second[name])]
        measured = {
            "norm": norm,
            "norm_ratio": np.linalg.norm(child[name]) / norm,
            "loss": np.linalg.norm(child[name] - exact[name]) / norm,
            "predicted_loss": np.linalg.norm(sigma[2:]) / norm,
            "energy_at_rank": np.sum(sigma[:2] ** 2) / norm**2,
            "cosine": np.sum(first[name] * second[name]) * 0.4 / sizes[0] / sizes[1],
            "dominance": max(sizes) / sum(sizes),
        }
        assert {key: layers[key][place] for key in measured} == pytest.approx(measured, rel=1e-2, abs=1e-3)
        assert layers["dominant"][place] == int(np.argmax(sizes))
        assert layers["rank_for_99"][place] == 1 + np.argmax(np.cumsum(sigma**2) >= 0.99 * norm**2)
        u, _, vt = np.linalg.svd(child[name])
        kept = u[:, :2] @ u[:, :2].T @ first[name] @ vt[:2].T @ vt[:2]
        assert layers["retention"][0][place] == pytest.approx(
            np.linalg.norm(kept) / np.linalg.norm(first[name]), abs=1e-2
        )


def test_the_receipt_of_a_large_adapter_stays_small(tmp_path: Path):
    linear = {f"model.layers.{layer}.self_attn.{name}_proj": (12, 12) for layer in range(56) for name in "qkvo"}
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, rank=1, linear=linear) for i in range(8)]

    proof = run_merge(folders, tmp_path / "out", method="svd", rank=4).receipt

    assert proof["modules"] == 224
    assert len(json.dumps(proof, separators=(",", ":"))) <= 64 * 1024


def test_the_receipt_of_many_parents_stays_small_and_keeps_the_pairs_that_have_most_to_do_with_each_other(
    tmp_path: Path,
):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i // 2, rank=1) for i in range(64)]  # each of them twice

    proof = run_merge(folders, tmp_path / "out", method="svd").receipt

    assert len(proof["parents"]) == 64
    assert [abs(pair["cosine"]) for pair in proof["pairs"][:32]] == [1.0] * 32
    assert len(proof["pairs"]) == 64
    assert len(json.dumps(proof, separators=(",", ":"))) <= 64 * 1024


def test_a_proof_holds_less_than_its_factors_in_float64(tmp_path: Path):
    """Modules of 16 bits do not need eight bytes a value, or those of a 70B model do not fit into a small worker."""
    width, rank = 8192, 24
    folders = [
        write_tiny_adapter(tmp_path / f"p{seed}", seed=seed, rank=rank, dtype="BF16", linear={"m": (width, width)})
        for seed in range(2)
    ]
    plan, files, out = plan_of(folders, method="svd", rank=rank), [f / WEIGHTS for f in folders], tmp_path / "out"
    out.mkdir()
    outcomes = engine.merge(plan, files, out)

    tracemalloc.start()
    receipt.prove(plan, files, out, outcomes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 * 3 * rank * 2 * width


def test_a_receipt_is_plain_json_and_small(parents: list[Path], tmp_path: Path):
    text = json.dumps(run_merge(parents, tmp_path / "out").receipt, allow_nan=False)

    assert len(text) < 4000


def test_parents_that_cancel_out_leave_a_proved_zero(parents: list[Path], tmp_path: Path):
    proof = run_merge([parents[0], parents[0]], tmp_path / "out", weights=(1.0, -1.0)).receipt

    assert proof["norm"] == 0
    assert proof["loss"] <= 1e-7


def test_one_wrong_value_fails_the_receipt(prove_changed: Callable[..., ReceiptFailed]):
    failed = prove_changed(lambda out: write_value(out, "A", 0.5, place=3), method="svd")

    assert {problem.code for problem in failed.problems} == {"factors_differ", "error_differs"}
    assert all(MODULE in problem.message for problem in failed.problems)


@pytest.fixture(scope="module")
def wide_parents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[Path]]:
    """Two parents of one module of 288 × 272, made once for each rank and type."""
    made: dict[tuple[int, str], list[Path]] = {}

    def parents(rank: int, dtype: str) -> list[Path]:
        if (rank, dtype) not in made:
            random, root = np.random.default_rng(rank), tmp_path_factory.mktemp(f"{dtype}-{rank}")
            factors = [(random.normal(size=(rank, 272)) / 16, random.normal(size=(288, rank)) / 9) for _ in range(2)]
            made[rank, dtype] = [
                write_factors(root / str(i), {"m": pair}, dtype=dtype) for i, pair in enumerate(factors)
            ]
        return made[rank, dtype]

    return parents


def rewritten(out: Path, side: str, change: Callable[[np.ndarray, np.ndarray], None]) -> bytes:
    """The weights file with one factor of its one module changed; `change` gets the rank-one parts as rows, and their
    numbers from the strongest on.
    """
    module, stored = facts_of(out).modules[0], bytearray((out / WEIGHTS).read_bytes())
    with TensorReader(out / WEIGHTS) as reader:
        a, b = reader.read(module.a), reader.read(module.b)
    entry, rows = (module.a, a) if side == "A" else (module.b, b.T)
    change(rows, np.argsort(-np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=0)))
    values = rows if side == "A" else rows.T
    stored[entry.begin : entry.end] = encode(np.ascontiguousarray(values), entry.dtype).tobytes()
    return bytes(stored)


def zero_the_strongest(rows: np.ndarray, order: np.ndarray) -> None:
    rows[order[0]] = 0


def turn_the_strongest(rows: np.ndarray, order: np.ndarray) -> None:
    rows[order[0]] *= -1


def swap_the_strongest(rows: np.ndarray, order: np.ndarray) -> None:
    rows[order[:2]] = rows[order[1::-1]]


def scale_the_strongest(rows: np.ndarray, order: np.ndarray) -> None:
    rows[order[0]] *= 1.05


def turn_one_value(rows: np.ndarray, order: np.ndarray) -> None:
    rows[order[0], np.argmax(np.abs(rows[order[0]]))] *= -1


def lose_the_end(rows: np.ndarray, order: np.ndarray) -> None:
    rows[:, -2:] = 0


@pytest.mark.parametrize(
    ("method", "rank", "dtype"),
    [
        *[(method, 16, "BF16") for method in ("cat", "svd", "tsv", "slerp", "ties", "ties_svd")],
        *[(method, 64, dtype) for method in ("cat", "svd") for dtype in ("BF16", "F16", "F32")],
        *[("svd", 4, "BF16"), ("tsv", 64, "F16"), ("ties", 64, "F16"), ("svd", 256, "BF16")],
    ],
)
def test_a_strong_part_that_is_wrong_fails_the_receipt_at_any_rank(
    wide_parents: Callable[[int, str], list[Path]], tmp_path: Path, method: str, rank: int, dtype: str
):
    """Without the checksums, which know of each, so also where the engine itself wrote the wrong one."""
    parents, out = wide_parents(rank, dtype), tmp_path / "out"
    plan, files = plan_of(parents, method=method, weights=(0.6, 0.4)), [folder / WEIGHTS for folder in parents]
    out.mkdir()
    outcomes = {name: replace(o, written=()) for name, o in engine.merge(plan, files, out).items()}
    sound = (out / WEIGHTS).read_bytes()
    receipt.prove(plan, files, out, outcomes)
    changes = [zero_the_strongest, turn_the_strongest, swap_the_strongest, scale_the_strongest, lose_the_end]
    if method not in {"ties", "ties_svd"}:  # rules on elements make values that no other value tells
        changes.append(turn_one_value)

    for change in changes:
        for side in "AB":
            (out / WEIGHTS).write_bytes(sound)
            (out / WEIGHTS).write_bytes(rewritten(out, side, change))
            with pytest.raises(ReceiptFailed) as failed:
                receipt.prove(plan, files, out, outcomes)
            assert {p.code for p in failed.value.problems} <= {"copy_differs", "factors_differ", "error_differs"}


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "ties_svd"])
def test_a_single_bit_fails_the_receipt(wide_parents: Callable[[int, str], list[Path]], tmp_path: Path, method: str):
    parents, out = wide_parents(64, "BF16"), tmp_path / "out"
    plan, files = plan_of(parents, method=method, weights=(0.6, 0.4)), [folder / WEIGHTS for folder in parents]
    out.mkdir()
    outcomes, sound = engine.merge(plan, files, out), (out / WEIGHTS).read_bytes()

    for entry in (facts_of(out).modules[0].a, facts_of(out).modules[0].b):
        flipped = bytearray(sound)
        flipped[entry.end - 2] ^= 1
        (out / WEIGHTS).write_bytes(flipped)
        with pytest.raises(ReceiptFailed, match="_differ"):
            receipt.prove(plan, files, out, outcomes)


@pytest.mark.parametrize("method", ["svd", "tsv", "ties", "ties_svd"])
def test_an_engine_that_loses_the_last_rows_fails_the_receipt(
    wide_parents: Callable[[int, str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    """A fault that checksums know nothing of: what went out reads back as it was."""
    parents = wide_parents(64, "BF16")

    def lossy(array: np.ndarray, dtype: str) -> np.ndarray:
        kept = np.arange(len(array)) < (283 if len(array) == 288 else len(array))
        return encode(np.where(kept[:, None], array, 0), dtype)

    monkeypatch.setattr(engine, "encode", lossy)

    with pytest.raises(ReceiptFailed, match="factors_differ"):
        run_merge(parents, tmp_path / "out", method=method)


@pytest.mark.parametrize(("dtype", "most"), [("BF16", 0.01), ("F16", 0.0025), ("F32", 1e-6)])
@pytest.mark.parametrize("rank", [4, 64, 256])
def test_what_rounding_may_explain_does_not_grow_with_the_rank(
    wide_parents: Callable[[int, str], list[Path]], tmp_path: Path, rank: int, dtype: str, most: float
):
    proof = run_merge(wide_parents(rank, dtype), tmp_path / "out", method="svd").receipt

    assert proof["loss_bound"] <= most


def constant(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.full_like(a, 0.3), np.full_like(b, 0.7)


def few_values(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0.1 * np.sign(a), 0.3 * np.sign(b)


def powers_of_two(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 2 ** np.round(4 * a), 2 ** np.round(4 * b)


def between_two(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Halfway between two bfloat16 values once a weight of 1/2 or 3/2 has moved them."""
    return np.round(a * 128) / 128 + 1 / 512, np.round(b * 128) / 128 + 1 / 512


def tiny_and_huge(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 1e-12 * a, 1e11 * b


def graded(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grades = np.geomspace(1, 1e6, len(a))
    return grades[:, None] * a, b / grades


def subnormal(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 1e-39 * a, 1e3 * b


def nearly_one_direction(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a[:1] + 1e-5 * a, b[:, :1] + 1e-5 * b


@pytest.mark.parametrize(
    "shape",
    [constant, few_values, powers_of_two, between_two, tiny_and_huge, graded, subnormal, nearly_one_direction],
    ids=lambda shape: shape.__name__,
)
@pytest.mark.parametrize("method", ["cat", "svd", "tsv", "slerp", "peft_linear", "ties"])
def test_no_pattern_of_values_raises_a_false_alarm(tmp_path: Path, method: str, shape: Callable[..., Any]):
    """Equal values are rounded alike, so that their roundings add up; and what is twice there, or cancels, or is far
    from 1 must not be taken for damage. Values beyond the range of a narrow type may cost a merge, but by that name.
    """
    allowed = {"bf16": {"underflow"}, "f16": {"underflow", "not_finite"}, "f32": set(), "f64": set()}
    random = np.random.default_rng(11)
    first, second = (shape(random.normal(size=(12, 48)), random.normal(size=(40, 12))) for _ in range(2))
    for i, (pair, weights) in enumerate(
        [((first, second), (0.7, 0.3)), ((first, first), (0.5, 1.5)), ((first, first), (1.0, -0.999))]
    ):
        for stored in ("BF16", "F64"):
            folders = [
                write_factors(tmp_path / f"{i}{stored}{side}", {"m": factors}, dtype=stored)
                for side, factors in enumerate(pair)
            ]
            for dtype in ("bf16", "f16", "f32", "f64"):
                out = tmp_path / f"{i}{stored}{dtype}"
                assert failures(folders, out, method=method, weights=weights, dtype=dtype) <= allowed[dtype]


def failures(folders: list[Path], out: Path, **ask: object) -> set[str]:
    try:
        run_merge(folders, out, **ask)
    except ReceiptFailed as failed:
        return {problem.code for problem in failed.problems}
    return set()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("size", [1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("common", ["equal", "signs"])
def test_columns_that_are_nearly_one_raise_no_false_alarm(tmp_path: Path, dtype: str, size: float, common: str):
    """Sums of equal values in float32 all round the same way, and what tells such columns apart is smaller."""
    for seed in range(4):
        random = np.random.default_rng(seed)
        parents = []
        for which in range(2):
            a = random.uniform(-1, 1, size=(8, 256)) / 16
            one = np.ones(256) if common == "equal" else np.sign(random.normal(size=256))
            b = np.outer(one, np.ones(8)) + size * random.normal(size=(256, 8))
            folder = tmp_path / f"p{seed}-{which}"
            parents.append(write_factors(folder, {"m": (a, b / 10)}, dtype="F32", scaling=2.0))

        proven = run_merge(parents, tmp_path / f"out-{seed}", method="svd", rank=8, weights=(0.5, 0.5), dtype=dtype)

        assert proven is not None


@pytest.mark.parametrize(("weight", "scaling"), [(1e-5, 1.0), (1e-3, 1e-3)])
def test_weights_that_leave_the_range_of_float16_are_refused_with_the_way_out(
    tmp_path: Path, weight: float, scaling: float
):
    random = np.random.default_rng(3)
    parents = [
        write_factors(
            tmp_path / f"p{i}",
            {"m": (0.01 * random.normal(size=(4, 32)), random.normal(size=(24, 4)))},
            dtype="F16",
            scaling=scaling,
        )
        for i in range(2)
    ]
    weights = (weight, weight)

    with pytest.raises(ReceiptFailed, match=r"values below the range of F16 cost .*\(use --dtype f32"):
        run_merge(parents, tmp_path / "cat", weights=weights, method="cat")

    assert run_merge(parents, tmp_path / "svd", weights=weights, method="svd", rank=8).receipt["loss"] < 0.01
    assert run_merge(parents, tmp_path / "wide", weights=weights, method="cat", dtype="f32").receipt["loss"] < 1e-6


def test_a_copied_factor_that_changed_in_its_last_bit_fails_the_receipt(prove_changed: Callable[..., ReceiptFailed]):
    def flip(out: Path) -> None:
        module = next(m for m in facts_of(out).modules if m.name == MODULE)
        with (out / WEIGHTS).open("r+b") as file:
            file.seek(module.b.begin)
            first = file.read(1)[0]
            file.seek(module.b.begin)
            file.write(bytes([first ^ 1]))

    failed = prove_changed(flip, method="cat")

    assert [problem.code for problem in failed.problems] == ["copy_differs"]


def test_a_value_that_is_not_finite_fails_the_receipt(prove_changed: Callable[..., ReceiptFailed]):
    failed = prove_changed(lambda out: write_value(out, "B", np.inf), method="svd")

    assert [problem.code for problem in failed.problems] == ["not_finite"]


def test_padding_that_is_not_zero_fails_the_receipt(tmp_path: Path):
    parents = [
        write_tiny_adapter(tmp_path / f"p{i}", rank=2, ranks={"model.layers.1.self_attn.v_proj": 5}) for i in (0, 1)
    ]
    plan, files, out = plan_of(parents), [folder / WEIGHTS for folder in parents], tmp_path / "out"
    out.mkdir()
    outcomes = engine.merge(plan, files, out)

    write_value(out, "A", 1e-30, place=-1)

    with pytest.raises(ReceiptFailed) as failed:
        receipt.prove(plan, files, out, outcomes)
    assert [problem.code for problem in failed.value.problems] == ["padding_not_zero"]


@pytest.mark.parametrize("change", [{"lora_alpha": 14}, {"use_rslora": True}])
def test_a_scaling_other_than_one_fails_the_receipt(
    prove_changed: Callable[..., ReceiptFailed], change: dict[str, object]
):
    def edit(out: Path) -> None:
        path = out / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    assert {problem.code for problem in prove_changed(edit).problems} == {"scaling_differs"}


def test_files_that_are_no_adapter_fail_the_receipt(prove_changed: Callable[..., ReceiptFailed]):
    failed = prove_changed(lambda out: (out / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(100)))

    assert "do not read as an adapter" in failed.message


def test_files_of_another_plan_fail_the_receipt(parents: list[Path], tmp_path: Path):
    files = [folder / WEIGHTS for folder in parents]
    merged = run_merge(parents, tmp_path / "out", method="svd", rank=3)
    other = plan_of(parents, method="svd", rank=3, weights=(1.0, 0.9))

    with pytest.raises(ReceiptFailed) as failed:
        receipt.prove(other, files, merged.folder, {})

    assert {problem.code for problem in failed.value.problems} == {"metadata_differs"}


def test_values_too_large_for_float16_are_refused_with_the_way_out(tmp_path: Path):
    parents = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, alpha=1e6, rank=1) for i in range(2)]

    with pytest.raises(ReceiptFailed, match="use --dtype f32"):
        run_merge(parents, tmp_path / "out", dtype="f16", method="cat")


def test_so_is_a_bias_too_large_for_float16(tmp_path: Path):
    bias = {f"base_model.model.{MODULE}.lora_B.bias": np.full(8, 1e5, np.float32)}
    parents = [
        write_tiny_adapter(tmp_path / f"p{i}", seed=i, linear={MODULE: (8, 6)}, lora_bias=True, extra=bias)
        for i in range(2)
    ]

    with pytest.raises(ReceiptFailed, match=r"lora_B\.bias holds values that are not finite.*use --dtype f32"):
        run_merge(parents, tmp_path / "out", dtype="f16", method="svd")


def test_a_method_that_promises_too_much_fails_the_receipt(parents: list[Path], tmp_path: Path):
    files, out = [folder / WEIGHTS for folder in parents], tmp_path / "out"
    out.mkdir()
    plan = plan_of(parents, method="svd", rank=2)
    outcomes = engine.merge(plan, files, out)
    flattered = {name: replace(outcome, error_squared=0.0) for name, outcome in outcomes.items()}

    with pytest.raises(ReceiptFailed, match="0 was promised"):
        receipt.prove(plan, files, out, flattered)
