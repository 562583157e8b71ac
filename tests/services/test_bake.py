"""Baking a version into its base: what is refused by name, what is left behind (nothing), and what it costs (little).

What is computed is held against PEFT in tests/oracle.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LINEAR, encode, safetensors_bytes, write_tiny_adapter

from adapterctl.registry.api import BakedView
from adapterctl.registry.domain.errors import (
    AdapterctlError,
    Conflict,
    InvalidInput,
    Recalled,
    ReceiptFailed,
    Refused,
    Unavailable,
)
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.services.bake import RECEIPT_FILE, bake
from adapterctl.registry.services.local import LocalRegistry
from adapterctl.registry.services.staging import room_beside

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 32}
WEIGHTS = "model.safetensors"
Tensors = Mapping[str, tuple[str, np.ndarray]]


def base_tensors(**more: tuple[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """Those of a tiny Llama in bfloat16, with a norm, a head and a table of integers; `more` by key, dots as `__`."""
    random = np.random.default_rng(7)

    def drawn(*shape: int) -> tuple[str, np.ndarray]:
        return "BF16", encode(random.normal(0, 0.1, shape).astype(np.float32), "BF16")

    found = {"model.embed_tokens.weight": drawn(32, 16), "lm_head.weight": drawn(32, 16)}
    found |= {f"{name}.weight": drawn(*shape) for name, shape in LINEAR.items()}
    found["model.norm.weight"] = drawn(16)
    found["model.position_ids"] = ("I64", np.arange(8))
    return found | {key.replace("__", "."): value for key, value in more.items()}


def write_base(folder: Path, tensors: Tensors | None = None, config: Mapping[str, Any] = CONFIG) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors or base_tensors()))
    return folder


_NUMBERS = count(1000)


@pytest.fixture
def baked(two_parents: LocalRegistry, tmp_path: Path) -> Callable[..., BakedView]:
    """Bake `translate:v1`, or an adapter that is written with `adapter`, into `tmp_path/out`."""

    def run(
        base: Path, *, out: Path | None = None, adapter: Mapping[str, Any] | None = None, **asked: Any
    ) -> BakedView:
        ref = "translate:v1"
        if adapter is not None:
            seed = next(_NUMBERS)
            folder = write_tiny_adapter(tmp_path / f"adapter-{seed}", seed=seed, **adapter)
            ref = two_parents.register(str(folder), name=f"own-{seed}").version.ref
        settings = two_parents.settings
        return bake(two_parents, parse_ref(ref), out or tmp_path / "out", base=base, settings=settings, **asked)

    return run


PARTIAL = f".out.*/model/.{WEIGHTS}.partial"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"base"} - {f"adapter-{n}" for n in range(1000, 2000)}


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_bake_writes_the_same_bytes_and_leaves_the_base_alone(baked, two_parents, tmp_path):
    base = write_base(tmp_path / "base")
    for path in (*base.iterdir(), base):
        path.chmod(path.stat().st_mode & ~0o222)
    before = contents(base)

    views = [
        bake(
            two_parents,
            parse_ref("translate"),
            tmp_path / f"out-{threads}",
            base=base,
            settings=replace(two_parents.settings, threads=threads),
        )
        for threads in (1, 3)
    ]

    first, second = (contents(tmp_path / f"out-{threads}") for threads in (1, 3))
    assert first == second
    assert contents(base) == before
    assert first[WEIGHTS] != before[WEIGHTS]
    assert [views[0].changed, views[0].converted, views[0].copied] == [4, 0, 4]
    assert {file.path: file.sha256 for file in views[0].files} == first


def test_the_receipt_names_what_it_was_made_of_and_the_card_its_base(baked, two_parents, tmp_path):
    base = write_base(tmp_path / "base")

    view = baked(base)

    out = tmp_path / "out"
    receipt = json.loads((out / RECEIPT_FILE).read_text())
    version = two_parents.version(parse_ref("translate:v1"))
    assert receipt["adapter"] == {
        "ref": "translate:v1",
        "content_digest": version.content_digest,
        "recipe_digest": None,
    }
    assert receipt["base"]["files"] == {WEIGHTS: contents(base)[WEIGHTS]}
    assert receipt["files"][WEIGHTS]["sha256"] == contents(out)[WEIGHTS]
    assert receipt["tensors"] == {"changed": 4, "converted": 0, "copied": 4}
    assert 0 < receipt["rounding"]["share"] == view.rounding < 2**-8 * 10
    assert receipt["fingerprint"]["numpy"] == np.__version__
    assert 'base_model: "tiny/base"\nbase_model_relation: finetune\n' in (out / "README.md").read_text()
    assert "is not pinned" in view.warnings[0]


def test_files_that_the_model_needs_go_along_and_weights_and_code_do_not(baked, tmp_path):
    base = write_base(tmp_path / "base", config=CONFIG | {"auto_map": {"AutoModel": "modeling_x.X"}})
    wanted = ["generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    wanted += ["LICENSE", "additional_chat_templates/tools.jinja"]
    unwanted = [
        "modeling_x.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
        ".git",
    ]
    (base / "additional_chat_templates").mkdir()
    for name in [*wanted, *unwanted, "README.md"]:
        (base / name).write_text(f"{{}} {name}")

    view = baked(base)

    found = contents(tmp_path / "out")
    assert found.keys() == {*wanted, "config.json", WEIGHTS, "README.md", RECEIPT_FILE}
    assert {name: found[name] for name in [*wanted, "config.json"]} == {
        name: contents(base)[name] for name in [*wanted, "config.json"]
    }
    assert "modeling" not in (tmp_path / "out" / "README.md").read_text()
    assert any("auto_map" in warning for warning in view.warnings)


@pytest.mark.parametrize("linked", [False, True])
def test_a_sharded_base_is_read_by_its_index_and_links_of_the_hubs_cache_are_followed(baked, tmp_path, linked):
    whole = write_base(tmp_path / "whole")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(CONFIG))
    names, keys = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), list(base_tensors())
    for name, own in zip(names, (keys[:3], keys[3:]), strict=True):
        place = tmp_path / f"blob-{name}" if linked else sharded / name
        place.write_bytes(safetensors_bytes({key: base_tensors()[key] for key in own}))
        if linked:
            (sharded / name).symlink_to(place)
    index = {key: names[key not in keys[:3]] for key in keys}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    baked(whole, out=tmp_path / "one")
    view = baked(sharded, out=tmp_path / "two")
    small = baked(sharded, out=tmp_path / "small", shard_bytes=1200)

    assert contents(tmp_path / "one")[WEIGHTS] == contents(tmp_path / "two")[WEIGHTS]
    assert view.copied == 4
    written = sorted(file.path for file in small.files if file.path.endswith(".safetensors"))
    assert written[0] == f"model-00001-of-{len(written):05}.safetensors"
    fresh = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert fresh["weight_map"].keys() == index.keys()
    assert fresh["metadata"]["total_size"] == sum(array.nbytes for _, array in base_tensors().values())
    assert set(fresh["weight_map"].values()) == set(written)


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(key): value for key, value in base_tensors().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix("model."),
        lambda key: f"language_model.{key}",
        lambda key: key.replace("model.", "model.language_model."),
    ],
)
def test_a_base_saved_without_its_head_or_inside_another_model_is_the_same_base(baked, tmp_path, change):
    baked(write_base(tmp_path / "plain"), out=tmp_path / "one")

    view = baked(write_base(tmp_path / "base", renamed(change)), out=tmp_path / "two")

    assert view.changed == 4
    assert loaded(tmp_path / "two").keys() == {change(key) for key in loaded(tmp_path / "one")}
    for key, value in loaded(tmp_path / "one").items():
        assert np.array_equal(loaded(tmp_path / "two")[change(key)], value)


def test_a_model_that_was_nested_anew_since_the_base_was_saved_is_the_same_model(baked, tmp_path):
    vision = {f"vision_tower.encoder.{name.removeprefix('model.')}.weight": ("F32", F32) for name in LINEAR}
    base = renamed(lambda key: f"language_model.{key}") | vision
    linear = {name.replace("model.", "model.language_model."): shape for name, shape in LINEAR.items()}

    view = baked(write_base(tmp_path / "base", base), adapter={"linear": linear})

    assert (view.changed, view.copied) == (4, 4 + len(vision))
    assert json.loads((tmp_path / "out" / RECEIPT_FILE).read_text())["rounding"]["worst"]["tensor"] in base


def test_a_head_that_is_stored_beside_the_embedding_that_it_is_tied_to_stays_what_it_is(baked, tmp_path):
    config = CONFIG | {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    adapter = {"linear": {}, "embedding": {"model.embed_tokens": (32, 16)}}

    view = baked(write_base(tmp_path / "base", config=config), adapter=adapter)

    before, after = loaded(tmp_path / "base"), loaded(tmp_path / "out")
    assert (view.untied, view.changed, after.keys()) == ("lm_head.weight", 1, before.keys())
    assert np.array_equal(after["lm_head.weight"], before["lm_head.weight"])
    fresh = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fresh["tie_word_embeddings"] is fresh["text_config"]["tie_word_embeddings"] is False


def loaded(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import deserialize  # deferred: only this test reads by it

    return {key: np.frombuffer(found["data"], np.uint8) for key, found in deserialize((folder / WEIGHTS).read_bytes())}


Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
F32 = np.zeros((16, 16), np.float32)
REFUSED: dict[str, tuple[Tensors, Mapping[str, Any], Mapping[str, Any] | None, str]] = {
    "a module that is not there": (
        {key: value for key, value in base_tensors().items() if V1 not in key}, CONFIG, None,
        rf"missing_module: the base has no {V1}\.weight",
    ),
    "two modules that it may be": (
        renamed(lambda key: f"text.{key}") | renamed(lambda key: f"vision.{key}"), CONFIG, None, "ambiguous_module",
    ),
    "another shape": (
        base_tensors() | {f"{Q0}.weight": ("F32", np.zeros((16, 24), np.float32))}, CONFIG, None,
        rf"{Q0}\.weight of the base is \[16, 24\], the delta is \[16, 16\]",
    ),
    "a bias that the base does not have": (
        base_tensors(), CONFIG, {"lora_bias": True}, rf"missing_bias: {Q0} has a lora_B\.bias",
    ),
    "a square weight of unknown orientation": (
        base_tensors(), CONFIG, {"config": {"fan_in_fan_out": True}}, "orientation_unknown",
    ),
    "a square weight beside a decoder of GPT-2": (
        base_tensors(), CONFIG | {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, None,
        "orientation_unknown",
    ),
    "a tied embedding of an encoder and decoder": (
        {key: value for key, value in base_tensors().items() if key != "lm_head.weight"},
        CONFIG | {"architectures": ["T5ForConditionalGeneration"]},
        {"embedding": {"model.embed_tokens": (32, 16)}}, "model.embed_tokens is tied to other layers of T5For",
    ),
    "a quantised base by its config": (
        base_tensors(), CONFIG | {"quantization_config": {"quant_method": "gptq"}}, None, "config.json says gptq",
    ),
    "a quantised base by its tensors": (
        base_tensors() | {f"{Q0}.qweight": ("I32", np.zeros((2, 16), np.int32))}, CONFIG, None, "holds .*q_proj.qw",
    ),
    "a base in 8 bits": (
        base_tensors() | {f"{Q0}.weight": ("U8", np.zeros((16, 16), np.uint8))}, CONFIG, None, "quantised: it holds",
    ),
    "a base with values that are not finite": (
        base_tensors() | {f"{Q0}.weight": ("F32", F32 + np.inf)}, CONFIG, None, rf"{Q0}\.weight has values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_left(baked, tmp_path, case):
    tensors, config, adapter, message = REFUSED[case]
    base = write_base(tmp_path / "base", tensors, config)

    with pytest.raises(Refused, match=message) as refused:
        baked(base, adapter=adapter)

    assert refused.value.hint
    assert left(tmp_path) == set()


def test_what_float16_cannot_hold_is_refused_where_it_was_copied_and_where_it_was_changed(baked, tmp_path):
    large = write_base(tmp_path / "base", base_tensors(model__norm__weight=("F32", np.full(16, 7e4, np.float32))))
    masked = base_tensors(model__norm__weight=("F32", np.full(16, -np.inf, np.float32)))

    with pytest.raises(InvalidInput, match="dtype 'float16' is not one of"):
        baked(large, dtype="float16")
    with pytest.raises(Refused, match=r"model\.norm\.weight has values that are NaN, infinite or beyond F16"):
        baked(large, dtype="F16")
    view = baked(write_base(tmp_path / "masked", masked), dtype="F16")

    assert (view.changed, view.converted, view.copied) == (4, 3, 1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def test_folders_that_are_no_whole_base_are_refused(baked, tmp_path):
    base = write_base(tmp_path / "base")
    cut, empty, other = (write_base(tmp_path / name) for name in ("cut", "empty", "other"))
    (cut / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-8])
    (empty / WEIGHTS).unlink()
    (other / WEIGHTS).rename(other / "model-1.safetensors")
    listed = {"weight_map": {"model.norm.weight": "model-1.safetensors", "lost.weight": "model-1.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(listed))

    for folder, error, message in (
        (cut, Refused, "the tensors need"),
        (empty, InvalidInput, "holds neither"),
        (other, Refused, "incomplete: lost.weight"),
        (tmp_path / "nowhere", InvalidInput, "holds no config.json"),
    ):
        with pytest.raises(error, match=message):
            baked(folder)


def test_files_of_a_base_that_lead_nowhere_are_refused(baked, tmp_path):
    base = write_base(tmp_path / "base")
    (base / WEIGHTS).rename(base / "model-1.safetensors")
    maps: list[Any] = [{"a": "gone.safetensors"}, {"a": "a\0b"}, {"a": "../b.safetensors"}, {"a": ""}, []]
    deep = '{"a":' * 100_000

    for text in [*(json.dumps({"weight_map": listed}) for listed in maps), deep]:
        (base / "model.safetensors.index.json").write_text(text)
        with pytest.raises((Refused, InvalidInput), match=r"cannot be read|is no index of weights") as refused:
            baked(base)
        assert "base" in refused.value.hint
    (base / "config.json").write_text(deep)
    with pytest.raises(InvalidInput, match=r"config\.json is not a model config"):
        baked(base)

    assert left(tmp_path) == set()


def test_a_config_whose_values_are_of_another_kind_than_usual_is_no_crash(baked, tmp_path):
    odd = {"model_type": ["llama"], "vocab_size": [32], "text_config": {"model_type": ["gpt2"], "vocab_size": {}}}

    view = baked(
        write_base(tmp_path / "base", config=CONFIG | odd), adapter={"embedding": {"model.embed_tokens": (32, 16)}}
    )

    assert view.changed == 5


def test_a_stored_head_of_another_architecture_is_its_own_unless_the_config_ties_it(baked, tmp_path):
    config, adapter = CONFIG | {"architectures": ["LlavaForConditionalGeneration"]}, {"linear": {"lm_head": (32, 16)}}

    view = baked(write_base(tmp_path / "base", config=config), adapter=adapter)

    assert (view.changed, view.untied) == (1, None)
    assert "tie_word_embeddings" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(Refused, match="lm_head is tied to other layers of Llava"):
        baked(
            write_base(tmp_path / "base-2", config=config | {"tie_word_embeddings": True}),
            out=tmp_path / "out-2",
            adapter=adapter,
        )


def test_a_folder_that_is_a_link_gets_the_model_where_the_link_leads(baked, tmp_path):
    base = write_base(tmp_path / "base")
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")

    baked(base)

    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / WEIGHTS).is_file()
    assert left(tmp_path) == {"out", "real"}


def test_another_base_than_the_one_it_is_pinned_to_takes_force_and_is_written_down(baked, two_parents, tmp_path):
    base = write_base(tmp_path / "base")
    two_parents.add_base("tiny/pinned", folder=base)
    pinned = {"config": {"base_model_name_or_path": "tiny/pinned"}}
    config = write_base(tmp_path / "config", config=CONFIG | {"hidden_size": 17})
    weights = write_base(tmp_path / "weights", base_tensors(model__norm__weight=("BF16", np.zeros(16, np.uint16))))

    right = baked(base, out=tmp_path / "right", adapter=pinned)
    for wrong, what in ((config, "config digest differ"), (weights, "weights digest differ")):
        with pytest.raises(Refused, match=what):
            baked(wrong, adapter=pinned)
    view = baked(weights, adapter=pinned, force=True)

    assert right.warnings == ()
    assert "baked by force" in view.warnings[0]
    assert json.loads((tmp_path / "out" / RECEIPT_FILE).read_text())["base"]["differs"] == ["weights digest"]


def test_without_a_folder_the_base_is_where_evaluations_find_it(two_parents, tmp_path):
    base = write_base(tmp_path / "base")
    settings = replace(two_parents.settings, base_paths=(f"tiny/base={base}",))

    view = bake(two_parents, parse_ref("chat"), tmp_path / "out", settings=settings)

    assert (view.ref, view.base) == ("chat:v1", "tiny/base")


def test_the_folder_that_one_is_in_can_be_written_to(baked, tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    baked(base, out=Path())

    assert WEIGHTS in contents(tmp_path / "here")


def test_places_that_are_taken_or_the_bases_own_are_refused(baked, tmp_path):
    base = write_base(tmp_path / "base")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()

    with pytest.raises(Conflict, match="not an empty folder"):
        baked(base, out=tmp_path / "taken")
    with pytest.raises(Conflict):
        baked(base, out=base)
    with pytest.raises(InvalidInput, match="is in the folder of the base"):
        baked(base, out=base / "baked")
    with room_beside(tmp_path / "out"), pytest.raises(Conflict, match="another command is writing to"):
        baked(base)


def test_a_recalled_version_is_not_baked(baked, two_parents, tmp_path):
    base = write_base(tmp_path / "base")
    folder = write_tiny_adapter(tmp_path / "adapter-1999", seed=1999)
    ref = parse_ref(two_parents.register(str(folder), name="leaked").version.ref)
    two_parents.recall(ref, reason="trained on leaked data")

    with pytest.raises(Recalled, match="leaked data"):
        bake(two_parents, ref, tmp_path / "out", base=base, settings=two_parents.settings)


def test_bytes_that_change_on_the_disk_fail_the_proof(baked, tmp_path):
    base = write_base(tmp_path / "base")

    def flip(done: int, total: int) -> None:
        if done == (base / WEIGHTS).stat().st_size:  # all is written, and the file is about to get its name
            (partial,) = tmp_path.glob(PARTIAL)
            with partial.open("r+b") as file:
                file.seek(-300, os.SEEK_END)
                byte = file.read(1)
                file.seek(-300, os.SEEK_END)
                file.write(bytes([byte[0] ^ 1]))

    with pytest.raises(ReceiptFailed, match="does not read back as it was written"):
        baked(base, on_progress=flip)

    assert left(tmp_path) == set()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_stops_it_leaves_nothing(baked, tmp_path, stop):
    base = write_base(tmp_path / "base")

    def after_the_first_piece(done: int, total: int) -> None:
        raise stop

    with pytest.raises(stop):
        baked(base, on_progress=after_the_first_piece)

    assert left(tmp_path) == set()


LARGE = {f"model.layers.{layer}.self_attn.q_proj": (1024, 1024) for layer in range(24)}
BAKE = """
import resource, sys
from pathlib import Path
from adapterctl.bootstrap import connect
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.services.bake import bake

registry = connect(readonly=True)
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
bake(registry, parse_ref(sys.argv[1]), Path(sys.argv[3]), base=Path(sys.argv[2]), settings=registry.settings)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def large_base(folder: Path, layers: int) -> Path:
    modules = list(LARGE.items())[:layers]
    zeros = {f"{name}.weight": ("F32", np.zeros(shape, np.float32)) for name, shape in modules}
    return write_base(folder, {**zeros, "model.embed_tokens.weight": ("F32", np.ones((4096, 1024), np.float32))})


@pytest.fixture
def process(two_parents: LocalRegistry, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Bake in a process of its own an adapter for the first modules of a base, which has as many layers."""

    def start(base: Path, layers: int, *more: str) -> subprocess.Popen[str]:
        seed = next(_NUMBERS)
        linear = dict(list(LARGE.items())[:layers])
        folder = write_tiny_adapter(tmp_path / f"adapter-{seed}", seed=seed, linear=linear)
        ref = two_parents.register(str(folder), name=f"own-{seed}").version.ref
        words = [sys.executable, "-c", BAKE, ref, str(base), str(tmp_path / "out"), *more]
        environment = {**os.environ, **two_parents.settings.to_env(), "ADAPTERCTL_THREADS": "1"}
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_memory_does_not_grow_with_the_base(process, tmp_path):
    peaks = []
    for layers in (2, 24):
        done = process(large_base(tmp_path / f"base-{layers}", layers), layers)
        out, err = done.communicate(timeout=240)
        assert done.returncode == 0, err
        peaks.append(int(out) / 1024)
        size = (tmp_path / "out" / WEIGHTS).stat().st_size
        for path in (tmp_path / "out").iterdir():
            path.unlink()

    assert size > 110e6
    assert peaks[1] < peaks[0] + 24, f"{peaks} MiB for bases of 25 and of 117 MB"


def test_a_kill_leaves_no_model_and_the_next_bake_sweeps_what_it_left(process, tmp_path):
    base = large_base(tmp_path / "base", 24)
    running = process(base, 24)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(PARTIAL)):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)

    running.send_signal(signal.SIGKILL)
    running.communicate()

    assert not (tmp_path / "out").exists()
    again = process(base, 24)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert left(tmp_path) == {"out"}


def test_a_full_disk_is_found_before_the_work(process, tmp_path):
    base = large_base(tmp_path / "base", 24)

    done = process(base, 24, str(50_000_000))
    _, err = done.communicate(timeout=240)

    assert done.returncode == 1
    assert Unavailable.__name__ in err
    assert left(tmp_path) == set()


def test_every_error_of_a_bake_is_one_of_ours(baked, tmp_path):
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))

    with pytest.raises(AdapterctlError, match="zip archive"):
        baked(base)
