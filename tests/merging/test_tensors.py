"""Reading tensors from a file that may be cut short at any moment, and what one pass over an adapter tells."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import encode, safetensors_bytes, write_tiny_adapter

from adapterctl.registry.domain.adapter import read_facts
from adapterctl.registry.domain.errors import Corrupt, InvalidAdapter
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.merging import tensors as merging_tensors
from adapterctl.registry.merging.tensors import Measured, TensorReader, measure


def measured(folder: Path) -> Measured:
    weights = folder / "adapter_model.safetensors"
    return measure(weights, read_facts(json.loads((folder / "adapter_config.json").read_text()), read_header(weights)))


def write(folder: Path, tensors: Mapping[str, tuple[str, np.ndarray]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "target_modules": ["q_proj", "emb"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "adapter_model.safetensors").write_bytes(
        safetensors_bytes({f"base_model.model.{key}": value for key, value in tensors.items()})
    )
    return folder


def f32(*rows: Any) -> tuple[str, np.ndarray]:
    return "F32", np.array(rows, np.float32)


def bf16(*rows: Any) -> tuple[str, np.ndarray]:
    return "BF16", encode(np.array(rows, np.float32), "BF16")


# The digests below were computed without this package: the canonical JSON was written out by hand and hashed.


def test_content_digest_of_a_plain_adapter(tmp_path):
    tensors = {"x.q_proj.lora_B.weight": f32([3], [4]), "x.q_proj.lora_A.weight": f32([1, 2])}

    folder = write(tmp_path, tensors, r=1, lora_alpha=2)

    assert measured(folder).content_digest == "c9fe86508d5099c953353c4be2d7a3ac8db02990d9f133aa481330154e148b1b"


def test_content_digest_of_an_adapter_with_a_name_an_embedding_rslora_and_bf16(tmp_path):
    tensors = {
        "x.q_proj.lora_A.default.weight": bf16([1], [2]),
        "x.q_proj.lora_B.default.weight": bf16([3, 4]),
        "emb.lora_embedding_A.default": bf16([1, -2], [0.5, 0]),
        "emb.lora_embedding_B.default": bf16([-0.25, 8]),
    }

    folder = write(tmp_path, tensors, r=2, lora_alpha=3, use_rslora=True, fan_in_fan_out=True)

    assert measured(folder).content_digest == "72ebcc1005f2d360042188aa8bf3dee2abca9bccd2d59828fe6b29bdd2f7cb20"


def test_the_digest_depends_on_what_is_computed_and_on_nothing_else(tmp_path):
    tensors = {"x.q_proj.lora_A.weight": f32([1, 2]), "x.q_proj.lora_B.weight": f32([3], [4])}
    named = {key.replace(".weight", ".other.weight"): value for key, value in tensors.items()}
    digest = measured(write(tmp_path / "a", tensors, r=1, lora_alpha=2)).content_digest

    same = [
        write(tmp_path / "b", dict(reversed(tensors.items())), r=1, lora_alpha=2),
        write(tmp_path / "c", named, r=1, lora_alpha=2, base_model_name_or_path="other"),
        write(tmp_path / "d", tensors, r=3, lora_alpha=5, rank_pattern={"q_proj": 1}, alpha_pattern={"q_proj": 2}),
    ]
    different = [
        write(tmp_path / "e", tensors, r=1, lora_alpha=3),
        write(tmp_path / "f", tensors, r=1, lora_alpha=2, fan_in_fan_out=True),
        write(tmp_path / "g", {**tensors, "x.q_proj.lora_B.weight": f32([3], [5])}, r=1, lora_alpha=2),
        write(tmp_path / "h", {key: bf16(*value[1]) for key, value in tensors.items()}, r=1, lora_alpha=2),
    ]

    assert {measured(folder).content_digest for folder in same} == {digest}
    assert len({measured(folder).content_digest for folder in different} | {digest}) == 5


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("block_bytes", [merging_tensors.BLOCK_BYTES, 100])
def test_norms_are_those_of_the_dense_delta(tmp_path, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(merging_tensors, "BLOCK_BYTES", block_bytes)
    folder = write_tiny_adapter(
        tmp_path, dtype=dtype, alpha=-6, embedding={"emb": (12, 6)}, conv={"conv": (4, 3, 3, 3)}, ranks={"conv": 2}
    )
    facts = read_facts(
        json.loads((folder / "adapter_config.json").read_text()), read_header(folder / "adapter_model.safetensors")
    )

    norms = measured(folder).norms

    with TensorReader(folder / "adapter_model.safetensors") as reader:
        for module in facts.modules:
            a = reader.read(module.a).reshape(module.rank, -1).astype(np.float64)
            b = reader.read(module.b).reshape(-1, module.rank).astype(np.float64)
            assert norms[module.name] == pytest.approx(np.linalg.norm(module.scaling * b @ a), rel=1e-12)
    assert set(norms) == {module.name for module in facts.modules}


def test_stored_types_are_widened_without_rounding(tmp_path):
    values = np.array([0.0, -0.0, 1.5, -2.25, 65504.0, 2.0**-24], np.float32)
    path = tmp_path / "w"
    stored = {dtype: (dtype, encode(values, dtype)) for dtype in ("F16", "F32", "F64")}
    path.write_bytes(safetensors_bytes({**stored, "BF16": ("BF16", np.array([0x3FC0, 0xC010], np.uint16))}))

    with TensorReader(path) as reader:
        read = {entry.key: reader.read(entry) for entry in read_header(path).tensors}

    assert [read[dtype].dtype for dtype in ("BF16", "F16", "F32", "F64")] == ["f4", "f4", "f4", "f8"]
    assert all(np.array_equal(read[dtype], values) for dtype in ("F16", "F32", "F64"))
    assert read["BF16"].tolist() == [1.5, -2.25]


def test_a_file_that_shrinks_after_it_was_opened_is_corrupt_and_no_bus_error(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(safetensors_bytes({"a": f32(*range(10_000)), "b": f32(1)}))
    entries = read_header(path).tensors

    with TensorReader(path) as reader:
        os.truncate(path, 20_000)
        with pytest.raises(Corrupt, match="ends inside a"):
            reader.read(entries[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(tmp_path, value, dtype):
    bits = {np.nan: 0x7FC0, np.inf: 0x7F80, -np.inf: 0xFF80}[value]
    bad = np.array([[1.0], [value]], np.float32)
    array = np.array([[0x3F80], [bits]], np.uint16) if dtype == "BF16" else encode(bad, dtype)
    folder = write(
        tmp_path, {"q_proj.lora_A.weight": f32([1, 2]), "q_proj.lora_B.weight": (dtype, array)}, r=1, lora_alpha=1
    )

    with pytest.raises(InvalidAdapter, match=r"q_proj\.lora_B\.weight holds 1 values") as caught:
        measured(folder)

    assert caught.value.problems[0].code == "not_finite"


@pytest.mark.parametrize(("size_a", "size_b"), [(1e120, 1.0), (1e200, 1e-200), (1e120, 1e120)])
def test_a_delta_whose_squares_overflow_is_refused(tmp_path, size_a, size_b):
    tensors = {
        f"q_proj.lora_{which}.weight": ("F64", np.full(shape, size))
        for which, shape, size in (("A", (1, 2), size_a), ("B", (2, 1), size_b))
    }
    folder = write(tmp_path, tensors, r=1, lora_alpha=1)

    with pytest.raises(InvalidAdapter, match="q_proj has a delta of norm") as caught:
        measured(folder)

    assert caught.value.problems[0].code == "too_large"


def test_threads_that_share_a_reader_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(safetensors_bytes({f"t{i}": ("F32", np.full(5000, i, np.float32)) for i in range(16)}))
    entries = read_header(path).tensors
    wrong: list[str] = []

    def read_all(reader: TensorReader) -> None:
        for _ in range(20):
            wrong.extend(e.key for e in entries if not (reader.read(e) == int(e.key[1:])).all())

    with TensorReader(path) as reader:
        threads = [threading.Thread(target=read_all, args=(reader,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_memory_does_not_grow_with_the_number_of_modules(tmp_path):
    linear = {f"layers.{i}.q_proj": (256, 256) for i in range(40)}
    folder = write_tiny_adapter(tmp_path, linear=linear, rank=16)
    size = (folder / "adapter_model.safetensors").stat().st_size
    measured(folder)

    tracemalloc.start()
    measured(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < size / 4
