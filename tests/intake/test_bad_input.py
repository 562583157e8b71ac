"""Files of strangers: whatever they hold, the answer is a clear refusal, fast, and nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import JSON, broken_bytes, false_headers, overwrite
from tiny import header_bytes, safetensors_bytes, write_tiny_adapter

from adapterctl.registry.domain.errors import Corrupt, InvalidAdapter, NotFound, Unavailable
from adapterctl.registry.domain.lora_config import FIELD_ROLES
from adapterctl.registry.merging.tensors import measure
from adapterctl.registry.services.register import CONFIG_FILE, WEIGHTS_FILE, Registration, inspect, register
from adapterctl.registry.stores.sql.ledger import SqlLedger

FUZZED = 10_000
PATIENCE_S = 5.0


def weights_are(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(data) and None


def config_is(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data) and None


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) * 2 // 3])


def with_trailing_bytes(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("ab") as file:
        file.write(b"\0" * 8)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def sharded(folder: Path) -> None:
    """As Transformers saves an adapter that was added to its model, beyond `max_shard_size`."""
    for place in (1, 2):
        shutil.copy(folder / WEIGHTS_FILE, folder / f"adapter_model-0000{place}-of-00002.safetensors")
    (folder / WEIGHTS_FILE).rename(folder / "model.safetensors.index.json")


def weights_are_a_link(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "elsewhere")
    (folder / WEIGHTS_FILE).symlink_to("elsewhere")


def weights_are_a_pipe(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


def config_is_a_link_to_a_secret(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to("/etc/passwd")


def readme_is_a_link_to_a_secret(folder: Path) -> None:
    (folder / "README.md").symlink_to("/etc/passwd")


def readme_is_huge(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\0" * (2**20 + 1))


def config_is_huge(folder: Path) -> None:
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(text + " " * 2**20)


def rewritten(**options: object) -> Callable[[Path], None]:
    return lambda folder: write_tiny_adapter(folder, **options) and None  # type: ignore[arg-type]


def with_nan(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (folder / WEIGHTS_FILE).write_bytes(data)


def without(suffix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        key = f"base_model.model.model.layers.0.self_attn.q_proj.{suffix}"
        half = {key: ("F32", np.ones((4, 16) if suffix.startswith("lora_A") else (16, 4), np.float32))}
        (folder / WEIGHTS_FILE).write_bytes(safetensors_bytes(half))

    return change


ZERO = np.zeros((2, 2), np.float32)
BAD = {
    "truncated": (truncated, "truncated"),
    "trailing bytes": (with_trailing_bytes, "bad_offsets"),
    "empty file": (weights_are(b""), "truncated"),
    "header bomb": (weights_are(header_bytes(b"{}", length=2**40)), "header_too_large"),
    "deep nesting": (weights_are(header_bytes(b'{"a":' + b"[" * 1_000_000)), "bad_json"),
    "text": (weights_are(b"hello, world: this is no adapter"), "not_safetensors"),
    "pickle by another name": (weights_are(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n"), "pickle"),
    "zip by another name": (weights_are(b"PK\x03\x04" + bytes(100)), "archive"),
    "gzip by another name": (weights_are(b"\x1f\x8b" + bytes(100)), "archive"),
    "only adapter_model.bin": (only_pickle, "pickle"),
    "shards": (sharded, "sharded"),
    "weights are a link": (weights_are_a_link, "not_a_file"),
    "weights are a pipe": (weights_are_a_pipe, "not_a_file"),
    "config links to a secret": (config_is_a_link_to_a_secret, "not_a_file"),
    "readme links to a secret": (readme_is_a_link_to_a_secret, "not_a_file"),
    "readme is huge": (readme_is_huge, "too_large"),
    "config is huge": (config_is_huge, "too_large"),
    "config is not JSON": (config_is("{"), "bad_json"),
    "config is a list": (config_is("[]"), "bad_json"),
    "config is no UTF-8": (config_is(b"\xff\xfe{}"), "bad_json"),
    "config repeats a key": (config_is('{"peft_type":"LORA","peft_type":"LORA"}'), "duplicate_key"),
    "config holds NaN": (config_is('{"peft_type":"LORA","lora_alpha":NaN}'), "bad_json"),
    "config holds infinity": (config_is('{"peft_type":"LORA","lora_alpha":1e999}'), "bad_json"),
    "config is deep": (config_is('{"a":' + "[" * 500_000), "bad_json"),
    "config is empty": (config_is("{}"), "not_lora"),
    "NaN weights": (with_nan, "not_finite"),
    "no lora_B": (without("lora_A.weight"), "missing_lora_b"),
    "no lora_A": (without("lora_B.weight"), "missing_lora_a"),
    "no tensors": (weights_are(safetensors_bytes({})), "no_tensors"),
    "lm_head of the base": (rewritten(extra={"lm_head.weight": ZERO}), "unknown_tensors"),
    "another weight of the base": (
        rewritten(extra={"base_model.model.model.layers.0.mlp.gate_proj.weight": ZERO}),
        "unknown_tensors",
    ),
    "the targeted weight of the base": (
        rewritten(extra={"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": ZERO}),
        "unknown_tensors",
    ),
    "modules_to_save": (
        rewritten(
            config={"modules_to_save": ["lm_head"]}, extra={"base_model.model.lm_head.modules_to_save.weight": ZERO}
        ),
        "modules_to_save",
    ),
    "pissa": (rewritten(config={"init_lora_weights": "pissa"}), "unconverted_init"),
    "olora": (rewritten(config={"init_lora_weights": "olora"}), "unconverted_init"),
    "huge rank": (rewritten(config={"r": 10**6}), "bad_rank"),
    "path in a name": (rewritten(extra={"../../etc/passwd": ZERO}), "bad_tensor_name"),
    "NUL in a name": (rewritten(extra={"base_model.model.x\0.lora_A.weight": ZERO}), "bad_tensor_name"),
    "bidi mark in the base": (rewritten(config={"base_model_name_or_path": "me\u202egnp"}), "bad_config"),
    "exponential pattern with look-ahead": (rewritten(config={"rank_pattern": {"(?=(a+)+$)a": 4}}), "bad_pattern"),
    "foreign Python module": (rewritten(config={"megatron_core": "os"}), "megatron"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_by_name_at_once_and_leaves_nothing_behind(case, tmp_path, home, sql_ledger):
    change, code = BAD[case]
    folder = write_tiny_adapter(tmp_path / "source")
    change(folder)
    before = sorted(path.name for path in home.iterdir())
    began = time.perf_counter()

    with pytest.raises(InvalidAdapter) as caught:
        take_in(sql_ledger, home, folder)

    assert time.perf_counter() - began < PATIENCE_S
    assert code in {problem.code for problem in caught.value.problems}
    assert caught.value.message
    assert all(problem.message for problem in caught.value.problems)
    assert sql_ledger.adapter_names() == []
    assert sql_ledger.bases() == []
    assert sorted(path.name for path in home.iterdir() if path.name != "staging") == before
    assert not (home / "staging").exists() or list((home / "staging").iterdir()) == []


def test_a_pickle_under_any_name_is_never_run(tmp_path, home, sql_ledger):
    marker = tmp_path / "was-run"
    payload = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for name in (WEIGHTS_FILE, "adapter_model.bin"):
        folder = write_tiny_adapter(tmp_path / name)
        (folder / WEIGHTS_FILE).unlink()
        (folder / name).write_bytes(payload)

        with pytest.raises(InvalidAdapter):
            take_in(sql_ledger, home, folder)

    assert not marker.exists()


def test_half_a_million_empty_tensors_are_refused_within_seconds(tmp_path):
    entry = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    folder = write_tiny_adapter(tmp_path)
    header = "{" + ",".join(entry % i for i in range(500_000)) + "}"
    (folder / WEIGHTS_FILE).write_bytes(header_bytes(header.encode()))
    began = time.perf_counter()

    with pytest.raises(InvalidAdapter) as caught:
        inspect(folder)

    assert caught.value.problems[0].code == "header_too_large"
    assert time.perf_counter() - began < PATIENCE_S


@pytest.mark.parametrize(
    "pattern", ["(a+)+(a+)+(a+)+b", "(.*)*(.*)*(.*)*x", "(a|a)*b", "(a|aa)+b", "(?:(?:a+)+)+b", "([a-z]+)*1"]
)
def test_an_exploding_pattern_is_answered_within_a_tenth_of_a_second(tmp_path, pattern):
    name = "a" * 200 + ".q_proj"
    config = {"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 8}}
    folder = write_tiny_adapter(tmp_path, linear={name: (4, 4)}, config=config)
    inspect(folder)  # loads RE2
    began = time.perf_counter()

    inspect(folder)

    assert time.perf_counter() - began < 0.1


def test_a_missing_folder_and_a_folder_without_an_adapter_say_what_to_give(tmp_path, home, sql_ledger):
    write_tiny_adapter(tmp_path / "parent" / "default")

    with pytest.raises(NotFound, match="is not there"):
        take_in(sql_ledger, home, tmp_path / "none")
    with pytest.raises(InvalidAdapter) as caught:
        take_in(sql_ledger, home, tmp_path / "parent")

    assert caught.value.problems[0].code == "missing_file"
    assert "default" in caught.value.hint


def test_a_full_disk_is_told_and_the_stage_folder_is_gone(tmp_path, home, sql_ledger):
    folder = write_tiny_adapter(tmp_path / "source", linear={f"l{i}.q_proj": (512, 512) for i in range(8)}, rank=64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(Unavailable):
            take_in(sql_ledger, home, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)

    assert list((home / "staging").iterdir()) == []
    assert sql_ledger.adapter_names() == []


PAIRS = [[f"base_model.model.layers.0.{name}.lora_{side}.weight" for side in "AB"] for name in ("q_proj", "other")]
NAMES = [
    "__metadata__",
    "lm_head.weight",
    "base_model.model.layers.0.q_proj.lora_B.bias",
    "base_model.model.layers.0.q_proj.lora_A.default.weight",
    "base_model.model.layers.0.q_proj.lora_embedding_A",
    "base_model.model.layers.9.q_proj.lora_A.weight",
    "base_model.model.layers.0.other.lora_A.weight",
    "base_model.model..lora_A.weight",
    "../x",
]
VALID = safetensors_bytes(
    {
        f"base_model.model.layers.{layer}.q_proj.lora_{side}.weight": ("F32", np.ones(shape, np.float32))
        for layer in range(2)
        for side, shape in (("A", (4, 3)), ("B", (3, 4)))
    }
)


#: What so many mutations must have met, or they are too much alike.
REACHED = {
    "accepted", "truncated", "header_too_large", "not_safetensors", "bad_json", "duplicate_key", "bad_header",
    "bad_tensor_name", "bad_dtype", "bad_shape", "bad_offsets", "not_finite", "no_tensors", "unknown_tensors",
    "missing_lora_a", "missing_lora_b", "shape_mismatch", "rank_mismatch", "not_targeted", "mixed_kinds",
    "several_adapters", "duplicate_tensor", "unexpected_lora_bias",
}  # fmt: skip


@st.composite
def other_files(draw: st.DrawFn) -> bytes:
    """A file whose header tells the truth, at times twice, of tensors that may not belong together, and of values that
    are no numbers.
    """
    pair = st.sampled_from([*PAIRS, PAIRS[0]]).flatmap(st.permutations)
    keys = pair | st.lists(st.sampled_from([*PAIRS[0], *NAMES]), max_size=4, unique=True)
    value, rank = draw(st.sampled_from([0.5, 0.5, np.nan, -np.inf])), draw(st.integers(1, 5))
    tensors = {}
    for key in draw(keys):
        usual = (rank, 3) if "A" in key else (3, rank)
        shape = draw(st.sampled_from([usual, usual, usual, (3,), (), (rank, 3, 1), (3, rank, 1, 1)]))
        dtype = draw(st.sampled_from(["F32", "F32", "F64", "F16"]))
        tensors[key] = (dtype, np.full(shape, value, {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[dtype]))
    data = safetensors_bytes(tensors)
    if draw(st.integers(0, 7)):
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return header_bytes(data[8 : end - 1] + b"," + data[9:end]) + data[end:]


def test_no_mutated_file_crashes_or_hangs_the_intake(fuzz_folder):
    path, codes = fuzz_folder / WEIGHTS_FILE, Counter()

    @settings(max_examples=FUZZED, suppress_health_check=list(HealthCheck))
    @given(data=broken_bytes(VALID) | false_headers(VALID, NAMES) | other_files())
    def take(data: bytes) -> None:
        overwrite(path, data)
        began = time.perf_counter()

        refusal = refusal_of(lambda: measure(path, inspect(fuzz_folder)))

        assert time.perf_counter() - began < PATIENCE_S
        assert refusal is None or isinstance(refusal, Corrupt) or refusal.problems
        codes.update({problem.code for problem in refusal.problems} if refusal else {"accepted"})

    take()

    assert codes.total() >= FUZZED
    assert set() == REACHED - codes.keys()


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(st.sampled_from(sorted(FIELD_ROLES)), JSON, min_size=1, max_size=4))
def test_no_config_crashes_the_intake(fuzz_folder, fields):
    overwrite(fuzz_folder / WEIGHTS_FILE, VALID)
    config = {**json.loads((fuzz_folder / "good_config.json").read_text()), **fields}
    overwrite(fuzz_folder / CONFIG_FILE, json.dumps(config).encode())

    refusal = refusal_of(lambda: inspect(fuzz_folder))

    assert refusal is None or refusal.problems
    assert refusal or all(np.isfinite(m.scaling) and m.scaling for m in inspect(fuzz_folder).modules)


def refusal_of(read: Callable[[], object]) -> InvalidAdapter | Corrupt | None:
    """The refusal, or None where it was accepted; any other error fails the test."""
    try:
        read()
    except (InvalidAdapter, Corrupt) as refusal:
        return refusal
    return None


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_adapter(tmp_path_factory.mktemp("fuzz"))
    shutil.copy(folder / CONFIG_FILE, folder / "good_config.json")
    return folder


def take_in(ledger: SqlLedger, home: Path, folder: Path) -> None:
    """Register `folder`; opening MLflow for it is a failure of the test, since nothing bad may get that far."""
    register(
        ledger,
        Registration(source=str(folder), name="victim"),
        open_versions=lambda: pytest.fail("MLflow was opened for a bad adapter"),
        open_hub=lambda source, wanted: pytest.fail("the hub was asked"),
        home=home,
        created_by="tester",
    )
