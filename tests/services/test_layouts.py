"""Versions in the layouts of others: what vLLM and the hub read, what keeps a version from it, what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import write_tiny_adapter

from adapterctl.registry.domain.errors import Conflict, InvalidInput, Recalled, Refused, Unavailable
from adapterctl.registry.domain.refs import parse_ref
from adapterctl.registry.services.layouts import lay_out, next_steps, vllm_rank
from adapterctl.registry.services.local import LocalRegistry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def register(
    registry: LocalRegistry,
    folder: Path,
    name: str,
    card: str = "",
    *,
    base: str | None = None,
    license: str = "mit",
    **adapter,
) -> str:
    """Label of a new version; each has a seed of its own, so that none is found to be another."""
    write_tiny_adapter(folder, seed=900 + len(registry.versions()), **adapter)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    found = registry.register(str(folder), name=name, base=base, metrics={"translate/nll": 1.5}, license=license)
    return found.version.ref


def out(registry: LocalRegistry, folder: Path, layout: str, *refs: str, **options):
    return lay_out(registry, [parse_ref(ref) for ref in refs], folder, layout, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_vllm_gets_config_and_weights_under_a_name_that_never_means_other_bytes(two_parents, tmp_path):
    version = two_parents.version(parse_ref("chat:v1"))

    [written] = out(two_parents, tmp_path / "serving", "vllm", "chat:v1")

    assert written.name == f"chat.v1.{version.content_digest[:8]}"
    assert Path(written.path) == tmp_path / "serving" / written.name
    stored = {record.path: record.sha256 for record in version.files}
    two_parents.pull(parse_ref("chat:v1"), tmp_path / "pulled")
    assert files(Path(written.path)) == {name: (tmp_path / "pulled" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    assert stored.keys() >= {CONFIG, WEIGHTS}


def test_what_the_resolver_of_vllm_asks_of_a_folder_holds(two_parents, tmp_path):
    """vllm/plugins/lora_resolvers/filesystem_resolver.py: a folder of that name, of type LORA, on the served base."""
    two_parents.alias_base("/models/tiny", two_parents.version(parse_ref("chat:v1")).base)

    [written] = out(two_parents, tmp_path, "vllm", "chat:v1", served_base="/models/tiny")

    config = json.loads((tmp_path / written.name / CONFIG).read_bytes())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "/models/tiny")
    assert written.base == "/models/tiny"
    assert next_steps([written], "vllm") == [
        f"vllm serve /models/tiny --enable-lora --max-lora-rank 8 --lora-modules {written.name}={written.path}"
    ]


def test_a_name_that_is_not_known_to_mean_the_base_is_refused(two_parents, tmp_path):
    with pytest.raises(Refused, match="is not known to be other/model") as refused:
        out(two_parents, tmp_path, "vllm", "chat:v1", served_base="other/model")

    assert "adapterctl base alias other/model" in refused.value.hint


def test_everything_that_vllm_would_serve_wrongly_or_not_at_all_is_named_and_nothing_is_written(two_parents, tmp_path):
    wide = register(two_parents, tmp_path / "wide", "wide", rank=24)
    uneven = register(two_parents, tmp_path / "uneven", "uneven", ranks={"model.layers.0.self_attn.q_proj": 2})
    biased = register(two_parents, tmp_path / "biased", "biased", lora_bias=True)
    named = register(two_parents, tmp_path / "named", "named", adapter_name="default")
    pictures = register(two_parents, tmp_path / "pictures", "pictures", conv={"visual.patches": (8, 3, 2, 2)})

    with pytest.raises(Refused) as refused:
        out(two_parents, tmp_path / "serving", "vllm", "chat:v1", wide, uneven, biased, named, pictures)

    codes = [problem.code for problem in refused.value.problems]
    assert codes == ["rank_too_large", "patterns", "lora_bias", "adapter_name", "convolution"]
    assert "--max-lora-rank 32" in refused.value.problems[0].hint
    assert f"adapterctl resize {wide} --rank 16" in refused.value.problems[0].hint
    assert files(tmp_path / "serving") == {}
    assert [each.ref for each in out(two_parents, tmp_path / "serving", "vllm", wide, max_lora_rank=32)] == [wide]


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (513, None)])
def test_the_rank_to_serve_with_is_one_that_vllm_takes(rank: int, needed: int | None):
    assert vllm_rank(rank) == needed


@pytest.mark.parametrize("asked", [0, 20, 1024])
def test_a_largest_rank_that_vllm_does_not_take_is_refused(two_parents, tmp_path, asked):
    with pytest.raises(InvalidInput, match=f"takes no --max-lora-rank {asked}") as refused:
        out(two_parents, tmp_path, "vllm", "chat:v1", max_lora_rank=asked)

    assert "64, 128, 256, 320, 512" in refused.value.hint


def test_exporting_again_leaves_what_is_there_and_other_files_are_a_conflict(two_parents, tmp_path):
    [first] = out(two_parents, tmp_path, "vllm", "chat:v1")
    before = Path(first.path).stat().st_ino

    both = out(two_parents, tmp_path, "vllm", "chat:v1", "translate:v1")
    assert Path(first.path).stat().st_ino == before

    Path(first.path, CONFIG).write_text("{}", encoding="utf-8")
    changed = files(tmp_path)
    with pytest.raises(Conflict, match="with other files than those of chat:v1"):
        out(two_parents, tmp_path, "vllm", "chat:v1")
    assert files(tmp_path) == changed
    assert {path.name for path in tmp_path.iterdir()} == {each.name for each in both}


def test_the_next_export_removes_what_a_killed_one_left(two_parents, tmp_path):
    (tmp_path / ".export.0123456789ab" / "chat" / "v1").mkdir(parents=True)
    (tmp_path / ".export.0123456789ab.lock").touch()

    out(two_parents, tmp_path, "peft", "chat:v1")

    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_a_recalled_version_is_not_laid_out(two_parents, tmp_path):
    bad = register(two_parents, tmp_path / "bad", "bad")
    two_parents.recall(parse_ref(bad), reason="leaks prompts")

    for layout in ("peft", "vllm", "hub"):
        with pytest.raises(Recalled, match="leaks prompts"):
            out(two_parents, tmp_path / layout, layout, bad)


def test_peft_gets_several_versions_as_they_are(two_parents, tmp_path):
    written = out(two_parents, tmp_path / "out", "peft", "chat:v1", "translate:v1")

    assert [each.name for each in written] == ["chat/v1", "translate/v1"]
    two_parents.pull(parse_ref("translate:v1"), tmp_path / "pulled")
    assert files(tmp_path / "out" / "translate" / "v1") == files(tmp_path / "pulled")


def test_the_hub_gets_a_card_that_says_what_the_registry_knows(two_parents, tmp_path):
    own = "---\ntags: [french]\npipeline_tag: translation\n---\n# Mine\n\nWords of its own.\n"
    ref = register(two_parents, tmp_path / "a", "hubbed", card=own)

    [written] = out(two_parents, tmp_path / "hub", "hub", ref)

    assert set(files(Path(written.path))) == {CONFIG, WEIGHTS, "README.md"}
    _, front, body = (tmp_path / "hub" / "hubbed" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert body == "# Mine\n\nWords of its own.\n"
    assert (card["base_model"], card["base_model_relation"]) == ("tiny/base", "adapter")
    assert (card["license"], card["library_name"], card["pipeline_tag"]) == ("mit", "peft", "translation")
    assert card["tags"] == ["french", "lora", "adapterctl"]
    [result] = card["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("translate", 1.5)
    assert next_steps([written], "hub") == [f"hf upload ORGANISATION/hubbed {written.path}"]


def test_the_hub_reads_the_card_that_is_made_for_an_adapter_without_one(two_parents, tmp_path):
    from huggingface_hub import ModelCard

    out(two_parents, tmp_path, "hub", "translate:v1")

    card = ModelCard.load(tmp_path / "translate" / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == "tiny/base"
    assert two_parents.version(parse_ref("translate:v1")).content_digest in card.text


@pytest.mark.parametrize(("layout", "name"), [("peft", "mine"), ("hub", "mine"), ("vllm", "mine"), ("vllm", "default")])
def test_names_that_a_reader_does_not_load_are_refused_with_the_command_that_writes_others(
    two_parents, tmp_path, layout, name
):
    named = register(two_parents, tmp_path / "named", "named", adapter_name=name)

    with pytest.raises(Refused, match=f"carry the adapter name '{name}'") as refused:
        out(two_parents, tmp_path / layout, layout, named)

    assert f"adapterctl resize {named} --rank 4" in refused.value.problems[0].hint
    assert files(tmp_path / layout) == {}


@pytest.mark.parametrize("layout", ["peft", "hub"])
def test_names_that_peft_loads_under_the_name_it_gives_by_itself_are_laid_out(two_parents, tmp_path, layout):
    named = register(two_parents, tmp_path / "named", "named", adapter_name="default")

    assert [each.ref for each in out(two_parents, tmp_path / layout, layout, named)] == [named]


@pytest.mark.parametrize("layout", ["peft", "vllm", "hub"])
def test_a_config_that_names_no_base_is_laid_out_under_that_of_the_registry(two_parents, tmp_path, layout):
    ref = register(two_parents, tmp_path / "a", "nameless", base="org/base", config={"base_model_name_or_path": None})

    [written] = out(two_parents, tmp_path / layout, layout, ref)

    assert written.base == "org/base"
    named = json.loads((Path(written.path) / CONFIG).read_bytes())["base_model_name_or_path"]
    assert named == (None if layout == "peft" else "org/base")


PATH = "/home/ada/models/llama"


def test_the_hub_is_told_no_path_of_this_machine(two_parents, tmp_path):
    """`"base_model" with value "/…" is not valid`: with PEFT's own card the hub refuses the whole upload."""
    card = f"---\nbase_model: {PATH}\ntags:\n- base_model:adapter:{PATH}\n- lora\n---\n# Mine\n"
    local = register(two_parents, tmp_path / "a", "local", card, config={"base_model_name_or_path": PATH})
    known = register(
        two_parents, tmp_path / "b", "known", card, base="org/base", config={"base_model_name_or_path": PATH}
    )

    written = {each.ref: Path(each.path) for each in out(two_parents, tmp_path / "hub", "hub", local, known)}

    fronts = {
        ref: yaml.safe_load((folder / "README.md").read_text().split("---")[1]) for ref, folder in written.items()
    }
    assert [front["tags"] for front in fronts.values()] == [["lora", "adapterctl"]] * 2
    assert "base_model" not in fronts[local]
    assert fronts[known]["base_model"] == "org/base"
    assert json.loads((written[known] / CONFIG).read_bytes())["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-only", {"license": "gpl-3.0"}),
        ("GPL-3.0-or-later", {"license": "other", "license_name": "gpl-3.0-or-later"}),
        ("MIT OR Apache-2.0", {"license": "other", "license_name": "mit-or-apache-2.0"}),
        ("Licence of Ada & Co.", {"license": "other", "license_name": "licence-of-ada-co"}),
    ],
)
def test_the_hub_gets_a_licence_that_it_takes(two_parents, tmp_path, given, said):
    ref = register(two_parents, tmp_path / "a", "licensed", license=given)

    [written] = out(two_parents, tmp_path / "hub", "hub", ref)

    front = yaml.safe_load((Path(written.path) / "README.md").read_text().split("---")[1])
    assert {key: front[key] for key in ("license", "license_name") if key in front} == said


def test_the_hub_takes_one_version_of_an_adapter_and_no_card_that_is_broken(two_parents, tmp_path):
    first = register(two_parents, tmp_path / "one", "twice")
    second = register(two_parents, tmp_path / "two", "twice", card="---\n[not: closed\n---\nText\n")

    with pytest.raises(InvalidInput, match="do not fit into one hub layout"):
        out(two_parents, tmp_path / "hub", "hub", first, second)
    with pytest.raises(Refused, match="no YAML mapping"):
        out(two_parents, tmp_path / "hub", "hub", second)
    assert not (tmp_path / "hub" / "twice").exists()


@pytest.mark.parametrize("front", ["- a list", "date: 2024-13-45", "a: 0b_", "[" * 1000])
def test_a_card_that_begins_with_no_mapping_is_refused(two_parents, tmp_path, front):
    ref = register(two_parents, tmp_path / "adapter", "odd", f"---\n{front}\n---\n# Odd\n")

    with pytest.raises(Refused, match="no YAML mapping"):
        out(two_parents, tmp_path / "hub", "hub", ref)

    assert not list((tmp_path / "hub").iterdir())


def test_a_folder_that_cannot_be_named_takes_back_those_before_it(two_parents, tmp_path):
    last = f"translate.v1.{two_parents.version(parse_ref('translate:v1')).content_digest[:8]}"
    (tmp_path / last).symlink_to(tmp_path / "nowhere")

    with pytest.raises(Unavailable, match="cannot be written"):
        out(two_parents, tmp_path, "vllm", "chat:v1", "translate:v1")

    assert [path.name for path in tmp_path.iterdir()] == [last]
