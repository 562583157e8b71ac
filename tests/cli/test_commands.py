"""Every verb as it is typed, on a real registry in a home of its own: tiny adapters, SQLite, MLflow in process."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from keys import public, write_key
from many import fill
from tiny import LINEAR, header_bytes, safetensors_bytes, write_tiny_lycoris
from tiny_merge import WEIGHTS, deltas, distance, facts_of

from adapterctl.bootstrap import connect
from adapterctl.cli.signing import pull_signed, sign_version, signature_of
from adapterctl.migrations import VERSION_TABLE
from adapterctl.registry.domain.digest import file_digest
from adapterctl.registry.domain.errors import Corrupt, Refused
from adapterctl.registry.domain.job import JobState, NewJob
from adapterctl.registry.domain.refs import Ref, parse_ref
from adapterctl.registry.domain.version import local_folder
from adapterctl.registry.services import doctor

Run = Callable[..., Any]


@pytest.fixture
def adapter(tmp_path: Path, tiny_adapter: Callable[..., Path]) -> Callable[..., str]:
    made = iter(range(100))
    return lambda **options: str(tiny_adapter(tmp_path / f"adapter-{next(made)}", **options))


def test_a_loha_is_refused_converted_registered_and_known_by_its_header(pair: Path, run: Run, tmp_path: Path):
    source, out = str(write_tiny_lycoris(tmp_path / "loha")), str(tmp_path / "lora")

    refused = run("register", source, "--name", "paint", code=5)
    converted = run("convert", source, "--out", out)
    registered = run("register", out, "--name", "paint", "-o", "json").data
    shown = run("show", "paint", "-o", "json").data

    assert "adapterctl convert" in refused.stderr
    assert "LoHa of rank 2 as LoRA: rank 4, F32, 1 modules" in converted.stdout
    assert f"adapterctl register {out} --name NAME --tag converted_from=loha" in converted.stderr
    assert registered["version"]["rank"] == 4
    assert shown["converted"]["method"] == "loha"
    assert shown["converted"]["weights"] == file_digest(Path(source) / "adapter_model.safetensors")
    assert "exactly from LoHa" in run("show", "paint").stdout


def test_a_header_that_says_nothing_true_of_a_conversion_is_passed_over(pair: Path, run: Run, adapter: Any):
    claim = {"method": "loha", "rev": 1, "weights": "0" * 64, "config": "1" * 64, "dtype": "F32"}
    claims = ["[" * 100_000, "{}", *(json.dumps(claim | one) for one in ({}, {"method": "x"}, {"weights": "x\x1b[2J"}))]

    for number, said in enumerate(claims):
        folder = Path(adapter(seed=90 + number))
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end]) | {"__metadata__": {"adapterctl.converted": said}}
        (folder / WEIGHTS).write_bytes(header_bytes(json.dumps(header).encode()) + data[end:])
        run("register", str(folder), "--name", f"claims-{number}")
    shown = [run("show", f"claims-{number}", "-o", "json").data["converted"] for number in range(len(claims))]

    assert [each and each["weights"] for each in shown] == [None, None, "0" * 64, None, None]


def test_a_conversion_that_is_cut_tells_what_each_module_lost(run: Run, tmp_path: Path):
    source = str(write_tiny_lycoris(tmp_path / "lokr", method="lokr"))

    told = run("convert", source, "--out", str(tmp_path / "one"), "--rank", "2", "--dtype", "bf16")
    made = run("convert", source, "--out", str(tmp_path / "two"), "--rank", "2", "-o", "json").data

    assert re.search(r"self_attn\.q_proj +4 +[0-9.]+%$", told.stdout, flags=re.MULTILINE)
    assert (made["rank"], made["source_rank"], made["modules"][0]["exact_rank"]) == (2, 2, 4)
    assert made["loss"] >= made["cut_loss"] > 0.01


def test_a_kernel_that_is_no_size_is_an_error_of_usage(run: Run, tmp_path: Path):
    source = str(write_tiny_lycoris(tmp_path / "loha"))

    for kernel in ("q_proj=3x", "q_proj=0", "q_proj", "q_proj=3x3x3x3"):
        assert "--kernel" in run("convert", source, "--out", str(tmp_path / "x"), "--kernel", kernel, code=2).stderr


def test_ls_lists_adapters_and_the_versions_of_one(read: Run):
    adapters = read("ls", "-q").stdout.split()
    versions = read("ls", "translate", "-q").stdout.split()

    assert adapters == ["chat", "translate", "translate-chat"]
    assert versions == ["translate:v1", "translate:v2"]


def test_ls_shows_a_table_with_headings(read: Run):
    first, *rows = read("ls", "translate").stdout.splitlines()

    assert first.split()[:4] == ["VERSION", "STAGES", "MADE", "BY"]
    assert [row.split()[0] for row in rows] == ["translate:v1", "translate:v2"]


@pytest.mark.parametrize(
    ("filters", "refs"),
    [
        (["--metric", "bleu>0.3"], ["translate:v2"]),
        (["--metric", "bleu<=0.3"], ["translate:v1"]),
        (["--tag", "team=mt"], ["translate:v2"]),
        (["--base", "no/such"], []),
        (["--stage", "production"], []),
    ],
)
def test_ls_filters_versions(filters: list[str], refs: list[str], read: Run):
    assert read("ls", *filters, "-q").stdout.split() == refs


def test_an_empty_answer_is_an_empty_list(read: Run):
    assert read("ls", "--stage", "production", "-o", "json").stdout == "[]\n"


def test_options_of_the_program_stand_before_or_after_the_command(read: Run):
    before = read("-o", "json", "show", "translate:v1").data
    after = read("show", "translate:v1", "-o", "json").data

    assert before == after
    assert read("-o", "json", "show", "translate:v1", "-q").stdout == "translate:v1\n"


def test_yaml_says_the_same_as_json(read: Run):
    assert (
        yaml.safe_load(read("show", "translate:v2", "-o", "yaml").stdout)
        == read("show", "translate:v2", "-o", "json").data
    )


def test_show_tells_what_was_registered(read: Run):
    text = read("show", "translate:v2").stdout

    for part in ("translate:v2", "translate:v1 (trained from)", "bleu = 0.31", "team = mt", "apache-2.0", "sha256:"):
        assert part in text


@pytest.mark.parametrize("ref", ["models:/translate/2", "translate:2", "translate"])
def test_references_of_other_tools_are_understood(ref: str, read: Run):
    assert read("show", ref, "-q").stdout == "translate:v2\n"


def test_an_unknown_name_is_not_found_with_a_suggestion(read: Run):
    ran = read("show", "translat:v1", code=3)

    assert ran.stdout == ""
    assert ran.stderr.splitlines()[0] == "error: there is no adapter 'translat'"
    assert "translate" in ran.stderr.splitlines()[1]


def test_an_unknown_version_is_not_found_and_says_which_there_are(read: Run):
    ran = read("show", "translate:v9", "-o", "json", code=3)

    error = json.loads(ran.stderr)
    assert error["exit_code"] == 3
    assert error["error"]["code"] == "not_found"
    assert "v1, v2" in error["error"]["hint"]


@pytest.mark.parametrize("name", ["a\nb", "a\u202eb", "../x", "A", ""])
def test_a_name_that_is_not_allowed_is_a_usage_error_and_is_shown_escaped(name: str, read: Run):
    ran = read("show", name, code=2)

    assert "\u202e" not in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_version_is_exported_for_vllm_and_the_command_that_serves_it_is_said(read: Run, tmp_path: Path):
    ran = read("export", "translate-chat:v1", str(tmp_path / "serving"), "--layout", "vllm", "-o", "json")

    [written] = ran.data
    assert written["name"].startswith("translate-chat.v1.")
    assert (tmp_path / "serving" / written["name"] / "adapter_model.safetensors").is_file()
    assert f"--max-lora-rank 8 --lora-modules {written['name']}={written['path']}" in ran.stderr
    said = read("export", "translate-chat", str(tmp_path), "--max-lora-rank", "64", code=2).stderr
    assert "go with --layout vllm" in said


def test_a_family_is_exported_and_told_to_be_here_already(read: Run, tmp_path: Path):
    folder = str(tmp_path / "family")

    assert read("export", "translate-chat", folder, "-q").stdout.split() == [
        "chat:v1",
        "translate:v1",
        "translate:v2",
        "translate-chat:v1",
    ]
    told = read("import", folder, "--dry-run", "-o", "json")
    assert "0 would be new, 4 were here before" in told.stderr
    assert [each["folder"] for each in told.data] == ["chat/v1", "translate/v1", "translate/v2", "translate-chat/v1"]
    assert "no folder" in read("import", str(tmp_path / "none"), code=3).stderr


def test_a_version_is_baked_into_its_base_and_told_what_became_of_it(read: Run, tmp_path: Path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text("{}")
    zeros = {f"{name}.weight": ("BF16", np.zeros(shape, np.uint16)) for name, shape in LINEAR.items()}
    (base / "model.safetensors").write_bytes(safetensors_bytes({**zeros, "norm.weight": ("F32", np.ones(16, "<f4"))}))

    told = read("bake", "translate", "--base", str(base), "--out", str(out), "--dtype", "bf16")
    again = read("bake", "translate", "--base", str(base), "--out", str(out), "-o", "json", code=1)

    for part in ("tiny/base + translate:v2", "4 changed, 1 converted to BF16", "of the delta", "model.safetensors"):
        assert part in told.stdout
    assert f"translate:v2 in tiny/base is in {out}" in told.stderr
    assert json.loads(again.stderr)["error"]["code"] == "conflict"
    assert "--base" in read("bake", "translate", "--out", f"{out}-2", code=1).stderr
    assert read("bake", "translate", "--base", str(base), "--out", f"{out}-2", "-q").stdout == f"{out}-2\n"


@pytest.mark.parametrize(
    "words", ["merge translate chat --dry-run", "plan translate chat", "resize translate --rank 1 --dry-run"]
)
def test_a_result_is_named_by_the_word_that_register_has_too(read: Run, words: str):
    assert read(*words.split(), "--name", "mine", "-q").stdout == "mine\n"
    assert "two names" in read(*words.split(), "--name", "mine", "--into", "other", code=2).stderr
    assert "--name" not in read(words.split()[0], "--help").stdout


def test_a_merge_weighs_a_layer_a_kind_of_module_and_a_group_of_layers_apart(run: Run, pair: Path, tmp_path: Path):
    by_layer = ["layers.0=0,2", "q_proj=1,-1", "layers.0-15=3,0.25"]

    run(
        "merge",
        "translate=0.5",
        "chat",
        "--into",
        "mix",
        *(word for one in by_layer for word in ("--layer-weights", one)),
    )

    run("pull", "mix", str(tmp_path / "mix"))
    first, second = deltas(tmp_path / "translate"), deltas(tmp_path / "chat")
    weights = {name: (0, 2) if "layers.0" in name else (1, -1) if "q_proj" in name else (3, 0.25) for name in first}
    assert len(set(weights.values())) == 3
    expected = {name: one * first[name] + other * second[name] for name, (one, other) in weights.items()}
    assert distance(deltas(tmp_path / "mix"), expected) <= 1e-6


def test_parents_whose_names_are_too_long_together_ask_for_a_name(run: Run, pair: Path, tmp_path: Path):
    run("register", str(tmp_path / "chat"), "--name", "c" * 125)

    told = run("plan", "translate", "c" * 125, code=2).stderr

    assert "the names of 2 parents, joined, are no name of an adapter: 135 characters" in told
    assert "--into NAME" in told


def test_an_adapter_is_resized_to_a_rank_to_a_share_of_its_energy_and_to_a_size(run: Run, pair: Path, tmp_path: Path):
    exact, made = deltas(tmp_path / "translate"), {}

    for words in ("--rank 1", "--energy 0.6", "--size 3kB"):
        label = run("resize", "translate:v1", *words.split(), "-q").stdout.strip()
        run("pull", label, str(tmp_path / label))
        made[words] = tmp_path / label

    kept = {words: 1 - distance(deltas(folder), exact) ** 2 for words, folder in made.items()}
    ranks = {words: facts_of(folder).max_rank for words, folder in made.items()}
    assert (ranks["--rank 1"], ranks["--energy 0.6"]) == (1, 2)
    assert kept["--rank 1"] < 0.6 <= kept["--energy 0.6"]
    weights = made["--size 3kB"] / WEIGHTS
    more = weights.stat().st_size // (ranks["--size 3kB"] + 1)
    assert 3000 - more < weights.stat().st_size <= 3000


def test_an_import_into_a_home_that_is_none_yet_can_be_planned_and_leaves_none_where_it_is_refused(
    run: Run, tiny_adapter: Callable[..., Path], tmp_path: Path
):
    home, folder = tmp_path / "none", tmp_path / "adapters"
    tiny_adapter(folder / "a")

    told = run("--home", str(home), "import", str(folder), "--dry-run", "-o", "json")
    (folder / "a" / "adapter_model.safetensors").write_bytes(b"none")
    run("--home", str(home), "import", str(folder), code=5)

    assert [(each["ref"], each["action"]) for each in told.data] == [("a", "register")]
    assert not home.exists()


def test_lineage_draws_the_family(read: Run):
    assert read("lineage", "translate-chat").stdout.splitlines()[0].startswith("translate-chat:v1  cat, rank")
    assert "translate:v1  trained from" in read("lineage", "translate-chat", "--up").stdout
    assert read("lineage", "translate-chat", "--up", "--depth", "1", "-q").stdout.split() == [
        "translate-chat:v1", "translate:v2", "chat:v1",
    ]  # fmt: skip
    assert read("lineage", "chat:v1", "--down", "-o", "mermaid").stdout.startswith("flowchart TB\n")
    assert read("lineage", "chat:v1", "-o", "dot").stdout.startswith("digraph lineage {\n")
    assert read("lineage", "chat:v1", "-o", "svg").stdout.startswith("<svg ")
    assert read("lineage", "chat:v1", "-o", "html").stdout.startswith("<!DOCTYPE html>\n")


def test_a_format_that_a_command_does_not_have_is_a_usage_error(read: Run):
    assert "'mermaid' is not one of table, json, yaml, name" in read("ls", "-o", "mermaid", code=2).stderr


def test_diff_compares_two_versions(read: Run):
    found = read("diff", "translate:v1", "translate:v2", "-o", "json").data

    assert (found["first"], found["second"], found["same_content"]) == ("translate:v1", "translate:v2", False)
    assert -1 <= found["cosine"] <= 1
    assert "cosine of the deltas" in read("diff", "translate:v1", "translate:v2").stdout


def test_diff_tells_the_modules_that_are_farthest_apart_first(read: Run):
    whole = read("diff", "translate:v1", "translate-chat:v1", "--layers", "-o", "json").data["layers"]
    text = read("diff", "translate:v1", "translate-chat:v1", "--layers", "--top", "2").stdout.splitlines()

    assert len(whole) == 4
    assert [row["distance"] for row in whole] == sorted((row["distance"] for row in whole), reverse=True)
    assert sum(row["share"] for row in whole) == pytest.approx(1)
    shown = [line.split()[0] for line in text if line.startswith("model.layers.")]
    assert shown == [row["module"] for row in whole[:2]] * 3, "once with distances, twice from the receipt"
    assert text[-1] == "2 more modules with --top 4 or -o json"
    cut = read("diff", "translate:v1", "translate-chat:v1", "--layers", "--top", "2", "-o", "json").data["layers"]
    assert cut == whole[:2]


def test_a_number_of_modules_goes_with_layers(read: Run):
    assert "--top" in read("diff", "translate:v1", "translate:v2", "--top", "3", code=2).stderr


def test_plan_tells_what_each_method_would_lose_and_changes_nothing(read: Run):
    plan = read("plan", "translate:v2", "chat:v1", "-o", "json").data
    dry = read("merge", "translate:v2", "chat:v1", "--dry-run", "-o", "json").data

    assert dry == plan
    assert {"cat", "svd"} <= {forecast["method"] for forecast in plan["forecasts"]}
    assert read("ls", "-q").stdout.split() == ["chat", "translate", "translate-chat"]


def test_methods_are_listed_and_explained(read: Run):
    assert {"cat", "svd", "sum"} <= set(read("methods", "-q").stdout.split())
    assert read("methods", "svd").stdout.startswith("svd\n")
    assert "known: " in read("methods", "svdd", code=3).stderr


def test_pull_gives_the_files_that_were_registered(read: Run, tmp_path: Path):
    read("pull", "translate:v1", str(tmp_path / "out"))

    files = {file["path"]: file["size_bytes"] for file in read("show", "translate:v1", "-o", "json").data["files"]}
    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == files


def test_register_tells_the_reference_and_knows_the_same_bytes_again(run: Run, adapter: Callable[..., str]):
    folder = adapter()

    first = run("register", folder, "--name", "translate", "--metric", "bleu=0.3", "-o", "json")
    again = run("register", folder, "--name", "translate", "-o", "json")

    assert (first.data["version"]["ref"], first.data["created"]) == ("translate:v1", True)
    assert (again.data["version"]["ref"], again.data["created"]) == ("translate:v1", False)
    assert "registered translate:v1" in first.stderr
    assert "nothing is new" in again.stderr


def test_all_jobs_that_are_not_ended_are_listed_and_of_others_the_newest(run: Run):
    with closing(connect().ledger) as ledger:
        ledger.submit_all([NewJob("merge", str(each), "merge a b", {}, "ada") for each in range(101)])

    assert len(run("jobs", "ls", "--state", "live", "-q").stdout.split()) == 101
    assert "101 queued or running" in run("doctor", code=None).stdout
    some = run("jobs", "ls", "-o", "json")
    assert len(some.data) == 100
    assert "the newest 100; --limit N for more" in some.stderr
    assert len(run("jobs", "ls", "--limit", "101", "-q").stdout.split()) == 101


def test_doctor_tells_of_a_failed_job_for_a_day(run: Run, home: Path):
    with closing(connect().ledger) as ledger:
        job, _ = ledger.submit(NewJob("merge", "k", "merge a b", {}, "ada"))
        ledger.claim("w", 60)
        ledger.finish(job.id, 1, JobState.FAILED, error={"code": "failure", "message": "no"})

    assert "1 failed within a day, the last: merge a b" in run("doctor", code=None).stdout
    with closing(sqlite3.connect(home / "registry.db")) as database, database:
        database.execute("UPDATE job SET ended_at = ended_at - 86401")
    assert "0 queued or running" in run("doctor", code=None).stdout


def test_register_refuses_a_folder_that_is_no_adapter(run: Run, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")

    ran = run("register", str(tmp_path), "--name", "translate", code=5)

    assert ran.stderr.startswith("error: ")
    assert run("ls", "-q").stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["register", "--name", "x"],
        ["register", "folder"],
        ["register", "folder", "--name", "x", "--metric", "bleu"],
        ["register", "folder", "--name", "x", "--batch", "file"],
        ["merge", "a", "b", "--weights", "1"],
        ["merge", "a", "b", "--layer-weights", "q_proj"],
        ["merge", "a", "b", "--timeout", "soon"],
        ["lineage", "a", "--up", "--down"],
        ["history", "a", "--head", "file"],
        ["promote", "a"],
        ["promote", "a", "--to", "v1"],
        ["jobs", "ls", "--state", "lost"],
        ["eval", "translate", "--base-dtype", "int3"],
        ["tag", "translate", "k"],
        ["tag", "translate", "k=1", "k=2"],
        ["tag", "translate", "k=1", "k-"],
        ["tag", "translate", "=1"],
        ["tag", "translate", "k=\udcff"],
        ["tag", "translate", "k=1", "--reason", "a\udcff"],
        ["recall", "translate:v1", "--reason", "\udcff"],
        ["rm", "translate:v1", "--yes", "--reason", "\udcff"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_a_usage_error(words: list[str], read: Run):
    read(*words, code=2)


def test_register_batch_registers_in_order_and_again_only_what_is_new(
    run: Run, adapter: Callable[..., str], tmp_path: Path
):
    entries: list[dict[str, Any]] = [
        {"source": adapter(seed=1), "name": "translate", "metrics": {"bleu": 0.2}},
        {"source": adapter(seed=2), "name": "translate", "from": "translate:v1"},
    ]
    file = tmp_path / "batch.yaml"
    file.write_text(yaml.safe_dump(entries))

    first = run("register", "--batch", str(file), "-q").stdout.split()
    again = run("register", "--batch", str(file), "-o", "json").data

    assert first == ["translate:v1", "translate:v2"]
    assert [entry["created"] for entry in again] == [False, False]
    assert run("show", "translate:v2", "-o", "json").data["parents"] == [
        {"ref": "translate:v1", "weight": None, "kind": "trained_from"}
    ]


@pytest.mark.usefixtures("in_background")
def test_merge_waits_for_the_version_and_says_what_it_understood(run: Run, pair: Path):
    ran = run("merge", "translate", "chat=0.5", "--method", "cat")

    assert "translate → translate:v1" in ran.stderr
    assert "translate:v1 × 1 + chat:v1 × 0.5 → translate-chat, cat, rank 8" in ran.stderr
    assert ran.stdout == "translate-chat:v1  loss 0, receipt passed\n"
    again = run("merge", "translate:v1", "chat:v1=0.5", "--method", "cat", "-q")
    assert again.stdout == "translate-chat:v1\n"


@pytest.mark.usefixtures("in_background")
def test_merge_without_waiting_prints_the_job_which_can_be_waited_for(run: Run, pair: Path):
    job = run("merge", "translate", "chat", "--no-wait").stdout.strip()

    waited = run("jobs", "wait", job, "-o", "json").data
    events = run("jobs", "logs", job).stdout

    assert [(row["id"], row["state"]) for row in waited] == [(job, "succeeded")]
    assert run("jobs", "ls", "-q").stdout.split() == [job]
    assert run("jobs", "show", job, "-o", "json").data["id"] == job
    assert len(events.splitlines()) > 3
    assert "Z attempt 1 of 3" in events  # a line that the attempt wrote
    assert run("ls", "translate-chat", "-q").stdout == "translate-chat:v1\n"


def test_a_merge_that_loses_too_much_is_refused_with_5(run: Run, pair: Path):
    ran = run("merge", "translate", "chat", "--method", "svd", "--rank", "1", "--max-loss", "0.0001", code=5)

    assert "loses" in ran.stderr or "loss" in ran.stderr
    assert run("ls", "-q").stdout.split() == ["chat", "translate"]


@pytest.mark.usefixtures("in_background")
def test_a_wait_that_is_too_short_ends_with_8_and_the_job_goes_on(run: Run, pair: Path):
    job = run("merge", "translate", "chat", "--no-wait", "-q").stdout.strip()

    ran = run("jobs", "wait", job, "--timeout", "0", code=None)
    assert ran.code in (0, 8)
    assert run("jobs", "wait", job).code == 0


def test_stages_are_promoted_rolled_back_and_remembered(run: Run, pair: Path, adapter: Callable[..., str]):
    run("register", adapter(seed=9), "--name", "translate")

    run("promote", "translate:v1", "--to", "production", "--reason", "first")
    run("promote", "translate:v2", "--to", "production", "--reason", "better")
    back = run("rollback", "translate", "--stage", "production", "--reason", "worse", "-o", "json").data
    run("demote", "translate", "--stage", "production")

    assert (back["ref"], back["previous"]) == ("translate:v1", "translate:v2")
    history = run("history", "translate", "--verify", "-o", "json")
    assert [event["action"] for event in history.data["events"]] == ["promote", "promote", "rollback", "demote"]
    assert history.data["findings"] == []
    assert "every link holds" in history.stderr


def test_history_of_no_adapter_tells_what_happened_in_the_registry(run: Run, pair: Path):
    run("promote", "translate:v1", "--to", "production", "--reason", "fits")
    run("recall", "chat:v1", "--reason", "leaked")

    table = run("history").stdout.splitlines()
    assert [line.split()[3:5] for line in table[1:]] == [
        ["register", "translate:v1"],
        ["register", "chat:v1"],
        ["promote", "translate:v1"],
        ["recall", "chat:v1"],
    ]
    events = run("history", "-o", "json").data
    assert [(event["id"], event["kind"], event["ref"]) for event in events][2] == (3, "promote", "translate:v1")
    assert run("history", "t*", "-q").stdout.split() == ["1", "3"]
    assert run("history", "--kind", "move", "--kind", "recall", "-q").stdout.split() == ["3", "4"]
    assert run("history", "--stage", "production", "--after", "2", "-q").stdout.split() == ["3"]
    assert run("history", "--after", "now").stdout == "nothing happened\n"
    assert run("history", "translate", "--after", "3", "-o", "json").data == []
    assert run("history", "translate", "-o", "json").data["name"] == "translate"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--verify",), 2, "--verify is for the whole history of one adapter"),
        (("translate", "--follow", "--export-head", "file"), 2, "--export-head is for the whole history"),
        (("--kind", "promoted"), 2, "no kind of event"),
        (("--stage", "prodction", "--follow"), 2, "'prodction' is no stage"),
        (("--stage", "\udcff"), 2, "is no stage"),
        (("--after", "yesterday"), 2, "'yesterday' is no event"),
        (("--after", "77"), 2, "event 77 is not there, the last one is 4"),
        (("nobody", "--follow"), 3, "no adapter 'nobody'"),
    ],
)
def test_events_that_cannot_be_shown_are_refused(read: Run, words: tuple[str, ...], code: int, said: str):
    assert said in read("history", *words, code=code).stderr


def test_history_that_is_followed_goes_on_until_it_is_left(run: Run, pair: Path):
    command = [sys.executable, "-m", "adapterctl", "history", "-f", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        first = [json.loads(following.stdout.readline()) for _ in range(2)]
        run("promote", "translate:v1", "--to", "production", "--reason", "fits")
        later = json.loads(following.stdout.readline())
        following.send_signal(signal.SIGINT)
        rest, said = following.communicate(timeout=60)

    assert [event["kind"] for event in first] == ["register", "register"]
    assert (later["id"], later["kind"], later["ref"], later["previous"]) == (3, "promote", "translate:v1", None)
    assert (following.returncode, rest, said) == (130, "", "")


def test_history_finds_a_head_that_is_no_longer_there(run: Run, pair: Path, tmp_path: Path):
    run("promote", "translate:v1", "--to", "staging")
    hash_of_the_last = run("history", "translate", "-o", "json").data["head"]
    exported, bare, other = tmp_path / "exported", tmp_path / "bare", tmp_path / "other"
    run("history", "translate", "--export-head", str(exported))
    bare.write_text(f"{hash_of_the_last}\n")
    other.write_text(exported.read_text().replace(hash_of_the_last, "0" * 63 + "1"))

    for kept in (exported, bare):
        run("history", "translate", "--verify", "--head", str(kept))
    ran = run("history", "translate", "--verify", "--head", str(other), code=1)

    assert "warning: row 1 is not the one that was kept: the history was written anew" in ran.stderr
    run("history", "translate", "--export-head", str(exported), code=2)
    run("history", "chat", "--verify", "--head", str(exported), code=2)


def test_a_signed_head_tells_who_vouches_for_it(run: Run, pair: Path, tmp_path: Path):
    run("promote", "translate:v1", "--to", "staging")
    for name in ("ada", "eve"):
        write_key(tmp_path, name)
    signed, bare, forged, broken = (tmp_path / name for name in ("signed", "bare", "forged", "broken"))

    def verify(head: Path, key: str, code: int) -> Any:
        words = ("--verify", "--head", str(head), "--key", str(tmp_path / key))
        return run("history", "translate", *words, "-o", "json", code=code)

    told = run("history", "translate", "--export-head", str(signed), "--sign", str(tmp_path / "ada.key")).stderr
    run("history", "translate", "--export-head", str(bare))
    head = json.loads(signed.read_text())
    forged.write_text(json.dumps(head | {"time": "2020-01-01T00:00:00Z"}))
    broken.write_text(json.dumps(head | {"signature": "no base64"}))

    assert "signed with" in told
    assert verify(signed, "ada.pub", 0).data["findings"] == []
    run("history", "translate", "--verify", "--head", str(signed))  # whoever has no key compares it all the same
    other = "is not by {}: the head was changed, or another key signed it"
    for kept, key in ((signed, "eve.pub"), (forged, "ada.pub"), (broken, "ada.pub")):
        assert verify(kept, key, 1).data["findings"] == [f"the signature of the head {other.format(key)}"]
    assert verify(bare, "ada.pub", 1).data["findings"] == ["the head is not signed: anyone could have written it"]
    for wrong in ("ada.key", "signed", "nowhere"):  # a private key, no key, no file
        verify(signed, wrong, 2)
    run("history", "translate", "--export-head", str(tmp_path / "x"), "--sign", str(tmp_path / "ada.pub"), code=2)
    assert not (tmp_path / "x").exists()
    run("history", "translate", "--verify", "--key", str(tmp_path / "ada.pub"), code=2)
    run("history", "translate", "--sign", str(tmp_path / "ada.key"), code=2)


def test_a_signature_from_the_key_to_who_pulls_only_what_was_signed(run: Run, pair: Path, tmp_path: Path):
    ada, _ = (write_key(tmp_path, name) for name in ("ada", "eve"))
    key, eve = {"key": str(tmp_path / "ada.key"), "pub": str(tmp_path / "ada.pub")}, str(tmp_path / "eve.pub")
    pulled, served, written = (tmp_path / name for name in ("pulled", "served", "envelope.json"))
    run("pull", "translate:v1", str(pulled))

    unsigned = run("pull", "translate:v1", str(served), "--key", key["pub"], code=5)
    signed = run("sign", "translate:v1", "--key", key["key"], "--files", str(pulled))
    other = run("verify", "translate:v1", "--key", eve, code=5)
    verified = run("verify", "translate:v1", "--key", key["pub"], "--envelope", str(written))
    run("pull", "translate:v1", str(served), "--key", key["pub"])

    keyid = public(ada).id
    assert "translate:v1 has no signature by that key: ada.pub did not sign it" in unsigned.stderr
    assert re.match(f"translate:v1 is signed\n  key +{keyid}\n", signed.stdout)
    assert f"adapter_config.json  sha256:{file_digest(pulled / 'adapter_config.json')}" in signed.stdout
    assert "eve.pub did not sign it" in other.stderr
    assert re.search(f"signatures  key {keyid[:16]}  .* by .*, verified", verified.stdout)
    assert f"key {keyid[:16]}" in run("show", "translate:v1").stdout
    assert (served / "adapter_config.json").is_file()
    envelope = json.loads(written.read_text())
    assert envelope == run("show", "translate:v1", "-o", "json").data["signatures"][0]["envelope"]
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %b"
    body = base64.b64decode(envelope["payload"])
    ada.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), message % (len(body), body))
    (pulled / "adapter_config.json").write_text("{}")
    changed = run("sign", "translate:v1", "--key", str(tmp_path / "eve.key"), "--files", str(pulled), code=5)
    assert "adapter_config.json has 2 bytes, the manifest says" in changed.stderr
    assert len(run("show", "translate:v1", "-o", "json").data["signatures"]) == 1
    run("recall", "translate:v1", "--reason", "leaked")
    assert "translate:v1 is recalled: leaked" in run("sign", "translate:v1", "--key", str(tmp_path / "eve.key")).stderr
    anyones = base64.b64encode(public(ada).der[:12] + bytes([1]) + bytes(31)).decode()
    (tmp_path / "anyones.pub").write_text(f"-----BEGIN PUBLIC KEY-----\n{anyones}\n-----END PUBLIC KEY-----\n")
    for words in (
        ("pull", "translate:v1", str(tmp_path / "other"), "--key", str(tmp_path / "anyones.pub")),
        ("sign", "translate:v1", "--key", key["pub"]),
        ("sign", "translate:v1", "--key", str(tmp_path / "nowhere")),
        ("verify", "translate:v1", "--key", key["key"]),
        ("verify", "--all", "--key", key["pub"]),
        ("verify", "translate:v1", "--envelope", str(written)),
        ("verify", "translate:v1", "--key", key["pub"], "--envelope", str(written)),  # is there already
    ):
        run(*words, code=2)


def test_what_a_server_tells_of_another_version_is_not_taken_for_the_one_that_was_asked_for(pair: Path, tmp_path: Path):
    write_key(tmp_path, "ada")
    registry = connect()
    with closing(registry.ledger):
        version = registry.version(parse_ref("translate:v1"))
        envelope, key = sign_version(parse_ref("translate@production"), version, tmp_path / "ada.key")
        registry.sign(parse_ref("translate:v1"), envelope=envelope, key=str(key))
        told = registry.version(parse_ref("translate:v1"))

    assert signature_of(parse_ref("translate"), told, tmp_path / "ada.pub") == envelope
    for asked in ("translate:v2", "chat:v1", "translate@sha256:01234567"):
        with pytest.raises(Refused, match=f"asked for {asked}, the registry tells of translate:v1"):
            signature_of(parse_ref(asked), told, tmp_path / "ada.pub")
    lies = ({"number": 2}, {"content_digest": "0" * 64}, {"files": told.files[:1]}, {"base_id": "other"})
    for lie in lies:
        with pytest.raises(Refused, match=r"what ada\.pub signed does not count: it"):
            signature_of(Ref("translate"), replace(told, **lie), tmp_path / "ada.pub")


def test_a_pull_by_key_leaves_nothing_where_the_server_sends_something_else_than_it_told(pair: Path, tmp_path: Path):
    write_key(tmp_path, "ada")
    asked, registry = parse_ref("translate:v1"), connect()

    class Liar:
        """Shows the signed version, and sends another one under its name."""

        def version(self, ref: Ref) -> Any:
            return registry.version(ref)

        def pull(self, ref: Ref, folder: Path) -> Any:
            sent = registry.pull(Ref("chat"), folder)
            return replace(sent, ref="translate:v1", name="translate", signatures=self.version(ref).signatures)

    with closing(registry.ledger):
        envelope, key = sign_version(asked, registry.version(asked), tmp_path / "ada.key")
        registry.sign(asked, envelope=envelope, key=str(key))
        with pytest.raises(Refused, match=r"what ada\.pub signed does not count"):
            pull_signed(Liar(), asked, tmp_path / "served", tmp_path / "ada.pub")  # type: ignore[arg-type]
        left = [path.name for path in tmp_path.iterdir() if "served" in path.name]
        pull_signed(registry, asked, tmp_path / "served", tmp_path / "ada.pub")

    assert left == []
    assert (tmp_path / "served" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("paths", "told"), [((), "lists no files"), (("../../.bashrc",), "lists '../../.bashrc'"), (("/etc/hosts",), "no")]
)
def test_nothing_is_signed_that_can_be_no_version(pair: Path, tmp_path: Path, paths: tuple[str, ...], told: str):
    write_key(tmp_path, "ada")
    registry = connect()
    with closing(registry.ledger):
        version = registry.version(parse_ref("translate:v1"))
    lie = replace(version, files=tuple(replace(version.files[0], path=path) for path in paths))

    with pytest.raises(Corrupt, match=told):
        sign_version(parse_ref("translate:v1"), lie, tmp_path / "ada.key")


def test_rm_asks_and_needs_an_answer(run: Run, pair: Path):
    ran = run("rm", "translate:v1", code=2)

    assert "adapterctl rm translate:v1 --yes" in ran.stderr
    assert run("rm", "translate:v1", "--yes", "--reason", "test").stdout == "translate:v1\n"
    assert run("ls", "translate", "--removed", "-o", "json").data[0]["state"] == "removed"


@pytest.mark.parametrize("words", [["rm", "--yes"], ["recall", "--reason", "x"], ["recall", "--undo", "--reason", "x"]])
def test_what_is_removed_or_recalled_is_a_version_and_not_the_newest(read: Run, words: list[str]):
    ran = read(words[0], "translate", *words[1:], code=2)

    assert "is an adapter, and not one of its versions" in ran.stderr
    assert "write translate:vN; adapterctl ls translate" in ran.stderr
    assert [each["recall"] for each in read("ls", "translate", "-o", "json").data] == [None, None]


def test_rm_of_a_parent_is_refused(run: Run, pair: Path):
    run("merge", "translate", "chat")

    ran = run("rm", "translate:v1", "--yes", code=5)

    assert "translate-chat:v1" in ran.stderr


def test_verify_repeats_a_merge(run: Run, pair: Path):
    run("merge", "translate", "chat")

    found = run("verify", "translate-chat:v1", "-o", "json").data

    assert (found["files"], found["recipe"]) == ("intact", "identical")


def test_verify_all_reads_every_version_and_makes_merges_again_where_asked(run: Run, pair: Path):
    run("merge", "translate", "chat")
    whole = run("verify", "--all")
    again = run("verify", "--all", "--rerun", "-o", "json").data
    with closing(connect().ledger) as ledger:
        folders = {each.name: local_folder(each.placement.location) for each in ledger.versions()}
    weights = folders["translate"] / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    shutil.rmtree(folders["chat"])

    found = run("verify", "--all", "-o", "json", code=1).data
    unmade = run("verify", "--all", "--rerun", "-o", "json", code=1).data
    told = run("verify", "--all", code=1).stdout

    assert whole.stdout == "3 of 3 versions are as registered\n"
    assert again == {"checked": 3, "rerun": 1, "bad": []}
    assert (found["checked"], found["rerun"]) == (3, 0)
    assert [(each["ref"], each["files"]) for each in found["bad"]] == [
        ("chat:v1", "damaged"),
        ("translate:v1", "damaged"),
    ]
    assert "are gone" in found["bad"][0]["details"][0]
    assert found["bad"][1]["details"] == ["adapter_model.safetensors has other content than the manifest says"]
    (child,) = [each for each in unmade["bad"] if each["ref"] == "translate-chat:v1"]
    assert (child["files"], child["recipe"]) == ("intact", "skipped")
    assert child["details"][0].startswith("its recipe cannot be run again: ")
    assert told.startswith("1 of 3 versions are as registered\n")
    assert run("verify", "--all", "-q", code=1).stdout.split() == ["chat:v1", "translate:v1"]


def test_verify_takes_one_version_or_all(read: Run):
    for words in ([], ["translate:v1", "--all"]):
        assert "--all" in read("verify", *words, code=2).stderr


def test_bases_are_listed_and_joined(run: Run, pair: Path):
    run("base", "add", "org/other")
    run("base", "alias", "./other", "org/other")

    listed = {base["name"]: spellings for base, spellings in run("base", "ls", "-o", "json").data}
    assert "./other" in listed["org/other"]
    run("base", "merge", "tiny/base", "org/other")
    assert run("base", "ls", "-q").stdout.split() == ["tiny/base"]


def test_doctor_checks_a_registry_and_tells_of_a_missing_one(run: Run, pair: Path, tmp_path: Path):
    checks = run("doctor", "-o", "json", code=None).data
    assert {"name", "status", "detail", "hint"} == set(checks[0])

    missing = run("--home", str(tmp_path / "none"), "doctor")
    assert missing.stdout.startswith("warning  home ")
    assert "adapterctl demo" in missing.stdout
    assert not (tmp_path / "none").exists()


def test_doctor_names_versions_whose_files_are_missing_or_cut_short(
    run: Run, adapter: Any, pair: Path, monkeypatch: pytest.MonkeyPatch
):
    def files() -> tuple[str, str]:
        told = run("doctor", "-o", "json", code=None).data
        return next((check["status"], check["detail"] + check["hint"]) for check in told if check["name"] == "files")

    run("register", adapter(seed=3), "--name", "removed")
    whole = files()
    with closing(connect().ledger) as ledger:
        folders = {each.name: local_folder(each.placement.location) for each in ledger.versions()}
    run("rm", "removed:v1", "--yes")
    cut = folders["translate"] / "adapter_model.safetensors"
    cut.chmod(0o600)
    cut.write_bytes(cut.read_bytes()[:-1])
    one = files()
    shutil.rmtree(folders["chat"])
    two = files()
    monkeypatch.setattr(doctor, "MOST_VERSIONS", 1)
    newest = files()

    assert whole[0] == "ok"
    assert one[0] == "error"
    assert "files are damaged of translate:v1: adapter_model.safetensors has" in one[1]
    assert "adapterctl verify translate:v1 --no-rerun" in one[1]
    assert "files are damaged of chat:v1, translate:v1: " in two[1]
    assert "adapterctl verify --all" in two[1]
    assert "chat:v1" in newest[1]
    assert "translate:v1" not in newest[1]


def test_doctor_warns_of_a_token_that_others_can_read(
    run: Run, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def found(text: str, mode: int) -> list[Any]:
        file.write_text(text)
        file.chmod(mode)
        return [check for check in run("doctor", "-o", "json", code=None).data if check["name"] == "settings"]

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "of ada"))
    file = tmp_path / "of ada" / "adapterctl" / "config.toml"
    file.parent.mkdir(parents=True)

    (warned,) = found('token = "canary"', 0o640)

    assert warned["status"] == "warning"
    assert warned["detail"] == f"{file} holds token and can be read by others (mode 640)"
    assert warned["hint"] == f"chmod 600 '{file}'"
    assert found('token = "canary"', 0o600) == []
    assert found('actor = "ada"', 0o644) == []


def test_an_error_of_the_database_of_mlflow_is_told_once_and_in_our_words(fresh: Run, pair: Path):
    with closing(sqlite3.connect(pair / "mlflow.db")) as database, database:
        database.execute("DROP TABLE registered_model_aliases")

    failed = fresh("promote", "translate:v1", "--to", "production")

    assert failed.code == 1
    assert "error: MLflow refused: no such table: registered_model_aliases\n" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "mlflow.store" not in failed.stderr


def test_a_tag_that_mlflow_did_not_take_is_recorded_and_written_by_the_same_command(run: Run, pair: Path):
    def fail(sql: str) -> None:
        with closing(sqlite3.connect(pair / "mlflow.db")) as database, database:
            database.execute(sql)

    run("tag", "translate:v1", "draft=yes")
    for event in ("INSERT", "UPDATE", "DELETE"):
        fail(f"CREATE TRIGGER no_{event} BEFORE {event} ON model_version_tags BEGIN SELECT RAISE(ABORT, 'full'); END")

    failed = run("tag", "translate:v1", "owner=ada", "draft-", code=1)

    assert "the tags of translate:v1 are recorded" in failed.stderr
    assert "run the same command again to write them to MLflow" in failed.stderr
    for event in ("INSERT", "UPDATE", "DELETE"):
        fail(f"DROP TRIGGER no_{event}")
    again = run("tag", "translate:v1", "owner=ada", "draft-", "-o", "json")
    assert (again.data["version"]["tags"], again.data["warnings"]) == ({"owner": "ada"}, [])
    assert len(run("history", "translate", "-o", "json").data["events"]) == 2
    with closing(sqlite3.connect(pair / "mlflow.db")) as database:
        tags = dict(database.execute("SELECT key, value FROM model_version_tags WHERE name = 'translate'"))
    assert (tags["owner"], "draft" in tags) == ("ada", False)


def test_a_tag_of_a_version_that_was_renamed_in_mlflow_is_recorded_with_a_warning(run: Run, pair: Path):
    client = mlflow.MlflowClient(f"sqlite:///{pair / 'mlflow.db'}")
    client.rename_registered_model("translate", "renamed")

    tagged = run("tag", "translate:v1", "owner=ada")

    assert tagged.stdout == "translate:v1: owner=ada\n"
    assert "warning: MLflow has no translate:v1: the tags are recorded, but not written there" in tagged.stderr


def test_doctor_looks_at_the_disk_also_where_the_ledger_cannot_be_read(run: Run, pair: Path):
    (pair / "registry.db").unlink()
    (pair / "registry.db").mkdir()

    found = {check["name"]: check["status"] for check in run("doctor", "-o", "json", code=1).data}

    assert found["registry"] == "error"
    assert {"home", "filesystem", "space"} < set(found)


def test_gc_tells_what_it_would_free_and_asks_before_it_does(run: Run, pair: Path):
    run("merge", "translate", "chat")
    freeable = ("gc", "--older-than", "0s")

    told = run(*freeable, "--dry-run", "-o", "json").data
    asked = run(*freeable, code=2)
    freed = run(*freeable, "--yes")

    assert [each["kind"] for each in told["found"]] == ["log"]
    assert "adapterctl gc --older-than 0s --yes" in asked.stderr
    assert told["found"][0]["name"] in freed.stdout
    assert freed.stdout.splitlines()[-1].endswith("are freed")
    assert run(*freeable).stdout == "nothing to free\n"
    assert run("verify", "translate-chat", "--no-rerun", "-o", "json").data["files"] == "intact"


def test_serve_prints_where_versions_are_shown_and_starts_nothing(run: Run, pair: Path):
    links = run("serve", "--links", "--port", "5999", "-o", "json").data

    assert [link["url"] for link in links] == [
        f"http://127.0.0.1:5999/#/models/{name}/versions/1" for name in ("chat", "translate")
    ]
    assert run("serve", "--links", "-q").stdout.startswith("http://127.0.0.1:5000/#/models/chat/")
    assert "leave one of them out" in run("serve", "--links", "--open", "chat", code=2).stderr


def test_reads_load_neither_mlflow_nor_numpy(family: Path):
    code = (
        "import sys\nfrom adapterctl.cli.main import app\n"
        "for words in ('ls', 'ls translate', 'show translate-chat:v1', 'lineage chat', 'jobs ls'):\n"
        f"    app(['--home', {str(family)!r}, *words.split()], standalone_mode=False)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert {"mlflow", "numpy", "torch", "transformers", "rich"}.intersection(done.stderr.split()) == set()


def test_reads_change_no_file(read: Run, family: Path):
    # SQLite's readers share memory through files beside the database, wherever they may write
    def snapshot() -> dict[Path, int]:
        files = (path for path in family.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
        return {path: path.stat().st_mtime_ns for path in files}

    before = snapshot()
    for words in ("ls", "show translate", "lineage translate", "jobs ls", "history translate"):
        read(*words.split())

    assert snapshot() == before


def test_without_a_registry_reads_say_so_and_make_none(run: Run, tmp_path: Path):
    home = tmp_path / "none"

    for words in ("ls", "show translate", "jobs ls", "lineage translate", "plan a b", "serve --links"):
        ran = run("--home", str(home), *words.split(), code=3)
        assert f"there is no registry in {home}" in ran.stderr
    assert "svd" in run("--home", str(home), "methods", "-q").stdout.split()

    assert not home.exists()


def test_a_registry_of_a_newer_program_is_not_touched(run: Run, pair: Path):
    with closing(sqlite3.connect(pair / "registry.db")) as ledger, ledger:
        ledger.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")

    for words in ("ls", "register folder --name x"):
        assert "newer" in run(*words.split(), code=2).stderr
    assert run("doctor", code=1).stdout.startswith("error ")


GATES = """
gates:
  - stage: production
    adapters: [translate]
    require: [bleu >= 0.3, approvals >= 1]
"""


def test_a_gate_from_file_to_forced_promotion(run: Run, pair: Path, tmp_path: Path):
    file, bad = tmp_path / "gates.yaml", tmp_path / "bad.yaml"
    file.write_text(GATES)
    bad.write_text(GATES.replace(">= 1", "=> 1"))

    assert run("gate", "lint", str(file)).stdout == "production: 2 conditions\n"
    assert "gates[0].require[1]: is 'approvals => 1', expected" in run("gate", "lint", str(bad), code=2).stderr
    assert "no gates were set" in run("gate", "show").stdout
    run("gate", "set", str(bad), code=2)
    run("gate", "set", str(file))
    assert run("gate", "show", "-o", "json").data["gates"][0]["require"] == ["bleu >= 0.3", "approvals >= 1"]
    (tmp_path / "r.json").write_text('{"metrics": {"bleu": 0.29}}')
    imported = run("eval", "import", str(tmp_path / "r.json"), "--ref", "translate:v1")
    checked = run("gate", "check", "translate:v1", "--to", "production", code=5)
    refused = run("promote", "translate:v1", "--to", "production", code=5)
    run("promote", "translate:v1", "--to", "production", "--force", code=2)
    run("approve", "translate:v1", "--to", "production", "--reason", "read it")
    forced = run("promote", "translate:v1", "--to", "production", "--force", "--reason", "the fair")

    assert re.search(r"bleu = 0.29  \(imported from file r.json sha256:[0-9a-f]{16}\)", imported.stdout)
    assert re.search(r"FAILED +bleu >= 0.3 +0.29 +-0.01\n", checked.stdout)
    assert re.search(r"FAILED +approvals >= 1 +nobody +-1\n", checked.stdout)
    assert "failed: bleu >= 0.3: bleu is 0.29, the gate asks for at least 0.3 (distance -0.01)" in refused.stderr
    assert "failed: approvals >= 1: the number of approvals is 0" in refused.stderr
    assert forced.stderr == "warning: the gate of production: bleu is 0.29, the gate asks for at least 0.3\n"
    events = run("history", "translate", "--verify", "-o", "json").data["events"]
    assert [(event["action"], event["reason"]) for event in events] == [("approve", "read it"), ("force", "the fair")]
    assert "FAILED   bleu >= 0.3" in run("gate", "decision", events[-1]["evidence"][:12]).stdout


LM_EVAL = {
    "results": {
        "wmt": {"alias": "wmt", "chrf,none": 44.5, "chrf_stderr,none": 0.5, "acc,strict-match": 0.5, "ter,none": "N/A"},
        "arc": {"acc,none": 1, "alias": "arc"},
    },
    "config": {"model": "hf"},
}


def test_what_lm_eval_wrote_becomes_metrics(run: Run, pair: Path, tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(LM_EVAL))
    (tmp_path / "other.json").write_text("[1]")

    shown = run("eval", "import", str(tmp_path / "results.json"), "--ref", "chat:v1", "-o", "json").data
    run("eval", "import", str(tmp_path / "other.json"), "--ref", "chat:v1", code=2)
    run("eval", "import", str(tmp_path / "nowhere.json"), "--ref", "chat:v1", code=3)

    assert shown["metrics"] == {"wmt/chrf": 44.5, "wmt/acc.strict-match": 0.5, "arc/acc": 1.0}
    assert set(shown["imported"]) == set(shown["metrics"])


def test_suites_are_checked_without_a_model_and_shown_with_whom_they_judge(run: Run, pair: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "un chat ->", "target": " a cat"}\n')
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\ntasks:\n  - {name: t, data: rows.jsonl, metrics: [chrf, nll], primary: nll}\n")

    checked = run("suite", "check", str(suite))
    run("suite", "set", "translate", str(suite))
    listed = run("suite", "ls", "-o", "json").data
    shown = run("suite", "show", "mine")

    assert checked.stdout == shown.stdout
    assert re.search(r"^t +1 of 1 +nll, chrf +64 +0$", shown.stdout, flags=re.MULTILINE)
    assert "'un chat ->' → ' a cat'" in shown.stdout
    assert [(each["name"], each["adapters"]) for each in listed] == [("mine", ["translate"])]
    suite.write_text("name: mine\ntasks: []\nmore: 1\n")
    assert "more: is no key of a suite" in run("suite", "check", str(suite), code=2).stderr
    run("suite", "show", "other", code=3)


def test_eval_takes_references_as_it_takes_run(run: Run, pair: Path):
    for words in (["eval"], ["eval", "run"]):
        assert "has no evaluation suite" in run(*words, "translate:v1", "-o", "json", code=2).stderr


def test_a_table_is_cut_where_nobody_says_how_long_it_may_be(
    run: Any, sql_ledger: Any, monkeypatch: pytest.MonkeyPatch
):
    fill(sql_ledger._db, adapters=9, each=2)
    monkeypatch.setattr("adapterctl.cli.commands.adapters.ROWS", 5)

    adapters, versions = run("ls"), run("ls", "--tag", "team=many")
    exact, more, few = run("ls", "--stage", "production", "--limit", "9"), run("ls", "--limit", "99"), run("ls", "-q")

    for cut in (adapters, versions):
        assert len(cut.stdout.splitlines()) == 1 + 5
        assert cut.stderr == "the first 5; --limit N for more\n"
    assert [len(whole.stdout.splitlines()) for whole in (exact, more, few)] == [1 + 9, 1 + 10, 10]
    assert (exact.stderr, more.stderr, few.stderr) == ("", "", "")
    assert len(run("ls", "large", "-o", "json").data) == 18
    assert [each["ref"] for each in run("ls", "large", "-o", "json", "--limit", "2").data] == ["large:v1", "large:v2"]
    assert run("ls", "--limit", "0", code=2).stdout == ""
    for all_of_them in (run("ls", "--limit", "9" * 20), run("jobs", "ls", "--limit", "9" * 20)):
        assert all_of_them.stderr == ""
