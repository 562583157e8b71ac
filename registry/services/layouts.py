"""Versions as folders in the form that others read: PEFT's own, what vLLM serves from, a repository of the hub.

Unlike `carry`, which takes a family with its lineage to another registry, each version stands alone here, and nothing
leads back but its name and digest. Written over `RegistryAPI`: it works with the registry of this machine and with a
server alike.
"""

from __future__ import annotations

import filecmp
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..api import LaidOut, RegistryAPI, VersionView
from ..domain.adapter import carried_name
from ..domain.errors import Conflict, InvalidInput, Problem, Recalled, Refused, Unavailable, raise_all
from ..domain.header import read_header
from ..domain.refs import Ref
from .register import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from .staging import own_folder

#: `peft` is what `pull` gives, at NAME/vN; `vllm` a folder to serve from; `hub` a repository with a model card.
Layout = Literal["peft", "vllm", "hub"]
#: What vLLM's --max-lora-rank may be, and is where nobody says. Source: vllm/config/lora.py, MaxLoRARanks.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_RANK = 16
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: What it takes for `license`. Source: its answer to another, https://github.com/huggingface/huggingface_hub/issues/4218
_HUB_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
_FRONT_MATTER = re.compile(r"---\r?\n(.*?\r?\n)---\r?\n", re.DOTALL)


def lay_out(
    registry: RegistryAPI,
    refs: Sequence[Ref],
    folder: Path,
    layout: Layout,
    *,
    max_lora_rank: int = VLLM_RANK,
    served_base: str | None = None,
) -> list[LaidOut]:
    """Write the verified files of each version to a folder of its own below `folder`: all of them, or none.

    Args:
        max_lora_rank: of the vLLM that will serve them, one of `VLLM_RANKS`.
        served_base: what that vLLM calls the base, where the adapters spell it otherwise.

    A folder that is there already, with the same files, is left as it is. Raises `Conflict` where other files are,
    `Recalled` for what is not to be used, `Refused` with everything that keeps the versions from the layout.
    """
    if max_lora_rank not in VLLM_RANKS:
        raise InvalidInput(
            f"vLLM takes no --max-lora-rank {max_lora_rank}", hint=f"one of {', '.join(map(str, VLLM_RANKS))}"
        )
    versions = _versions(registry, refs)
    places = {_place(version, layout): version for version in versions}
    if len(places) < len(versions):
        raise InvalidInput(
            f"several versions of one adapter do not fit into one {layout} layout", hint="export them one by one"
        )
    if served_base is not None:
        _check_spelling(registry, versions, served_base)
    try:
        with own_folder(folder, ".export.") as room:
            problems = []
            for place, version in places.items():
                registry.pull(Ref(version.name, number=version.number), room / place)
                problems += _check_names(version, room / place, layout)
                if layout == "vllm":
                    problems += _for_vllm(version, room / place, max_lora_rank, served_base)
                elif layout == "hub":
                    problems += _for_hub(version, room / place)
            raise_all(Refused, f"not everything fits the {layout} layout; nothing was written:", problems)
            bases = {place: _base(version, _config(room / place)) for place, version in places.items()}
            _move_in(places, room, folder)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror}", hint="give another folder") from error
    return [
        LaidOut(version.ref, place, str(folder / place), bases[place], version.rank)
        for place, version in places.items()
    ]


def next_steps(written: Sequence[LaidOut], layout: Layout) -> list[str]:
    """The commands that take it from there, one a line."""
    if layout == "hub":
        return [f"hf upload ORGANISATION/{each.name} {shlex.quote(each.path)}" for each in written]
    if layout == "peft":
        return []
    steps = []
    for base in dict.fromkeys(each.base for each in written):
        here = [each for each in written if each.base == base]
        modules = shlex.join(f"{each.name}={each.path}" for each in here)
        rank = vllm_rank(max(each.rank for each in here))
        steps.append(f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --lora-modules {modules}")
    return steps


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that serves an adapter of this rank, or None."""
    return next((each for each in VLLM_RANKS if each >= rank), None)


def _versions(registry: RegistryAPI, refs: Sequence[Ref]) -> list[VersionView]:
    found = (registry.version(ref, agreed=True) for ref in refs)
    versions = {version.ref: version for version in found}
    for version in versions.values():
        if version.recall is not None:
            raise Recalled.of(version.ref, version.recall.ref, version.recall.reason, "export another version")
    return list(versions.values())


def _move_in(places: Mapping[str, VersionView], room: Path, folder: Path) -> None:
    """Give every folder its name, one after the other, or none; what is there already has to be the same."""
    new = []
    for place, version in places.items():
        target = folder / place
        if not target.exists():
            new.append(place)
        elif not _same_files(room / place, target):
            raise Conflict(
                f"{target} is there, with other files than those of {version.ref}", hint="give another folder"
            )
    moved = []
    try:
        for place in new:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (room / place).replace(folder / place)
            moved.append(place)
    except OSError:
        for place in moved:
            (folder / place).replace(room / place)
        raise


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if not other.is_dir() or names != sorted(path.name for path in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _place(version: VersionView, layout: Layout) -> str:
    if layout == "vllm":
        # a name that never means other bytes: vLLM keeps what it computed under the name of an adapter
        return f"{version.name}.v{version.number}.{version.content_digest[:8]}"
    return version.name if layout == "hub" else f"{version.name}/v{version.number}"


def _check_names(version: VersionView, files: Path, layout: Layout) -> list[Problem]:
    """PEFT loads names with an adapter's in them under that one alone, as another it warns and gives an untrained one.

    `default` is what it takes where nobody says another. vLLM knows no such names (vllm/lora/utils.py).
    """
    carried = carried_name(read_header(files / WEIGHTS_FILE).tensors[0].key)
    if carried is None or (carried == "default" and layout != "vllm"):
        return []
    return [
        Problem(
            "adapter_name",
            f"tensor names of {version.ref} carry the adapter name {carried!r}: PEFT loads them under that name alone, "
            "vLLM not at all",
            f"`adapterctl resize {version.ref} --rank {version.rank}` writes PEFT's names, without loss",
        )
    ]


def _for_vllm(version: VersionView, files: Path, max_lora_rank: int, base: str | None) -> list[Problem]:
    """Config and weights alone, with the base under the name that vLLM serves it by.

    vLLM reads r, lora_alpha and use_rslora of a config and ignores patterns (vllm/lora/peft_helper.py), so that an
    adapter with some would be served at wrong sizes; one above --max-lora-rank is refused when it is asked for.
    """
    config, problems = _config(files), []
    if version.rank > max_lora_rank:
        enough = vllm_rank(version.rank)
        larger = f"serve with --max-lora-rank {enough} and say so here, or " if enough else ""
        problems.append(
            Problem(
                "rank_too_large",
                f"{version.ref} has rank {version.rank}, vLLM is to take ranks up to {max_lora_rank}",
                f"{larger}`adapterctl resize {version.ref} --rank {max_lora_rank}`",
            )
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append(
            Problem(
                "patterns",
                f"{version.ref} has a rank_pattern or an alpha_pattern, which vLLM ignores",
                f"`adapterctl resize {version.ref} --rank {version.rank}` makes it uniform, without loss",
            )
        )
    if config.get("lora_bias"):
        problems.append(Problem("lora_bias", f"{version.ref} has biases (lora_bias), which vLLM does not add"))
    kernels = [each.key for each in read_header(files / WEIGHTS_FILE).tensors if len(each.shape) > 2]
    if kernels:  # vllm/lora/utils.py: linear layers and embeddings can be adapted there, any other module is refused
        text = f"{version.ref} adapts convolutions, which vLLM does not load: {kernels[0]}"
        problems.append(Problem("convolution", text, "`adapterctl bake` writes a full model with the adapter in it"))
    _name_base(files, base or _base(version, config))
    _keep(files, CONFIG_FILE, WEIGHTS_FILE)
    return problems


def _for_hub(version: VersionView, files: Path) -> list[Problem]:
    """Config, weights and a model card whose front matter says what the registry knows.

    Source of the fields: https://huggingface.co/docs/hub/model-cards.
    """
    import yaml  # deferred: as in `carry`

    card = files / README_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    found = _FRONT_MATTER.match(text)
    try:
        known = (yaml.safe_load(found[1]) or {}) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that there is not
        known = None
    if not isinstance(known, dict):
        problem = f"the README of {version.ref} begins with something that is no YAML mapping"
        return [Problem("bad_card", problem, "mend it where the adapter came from, and register it again")]
    if _HUB_ID.fullmatch(version.base):
        _name_base(files, version.base)
    body = text[found.end() :] if found else text
    front = yaml.safe_dump(_front_matter(version, known), sort_keys=False, allow_unicode=True)
    card.write_text(f"---\n{front}---\n{body or _card(version)}", encoding="utf-8")
    _keep(files, CONFIG_FILE, WEIGHTS_FILE, README_FILE)
    return []


def _front_matter(version: VersionView, known: Mapping[str, Any]) -> dict[str, Any]:
    tags = known.get("tags")
    # PEFT writes the base as a tag too, perhaps a path; the hub makes that tag itself
    kept = [tag for tag in (tags if isinstance(tags, list) else []) if not str(tag).startswith("base_model:")]
    front: dict[str, Any] = {
        **known,
        "library_name": "peft",
        "base_model_relation": "adapter",
        "tags": list(dict.fromkeys([*kept, "lora", "adapterctl"])),
    }
    front.pop("base_model", None)  # the hub refuses an upload that names a path here
    if _HUB_ID.fullmatch(version.base):
        front["base_model"] = version.base
    if version.license:
        front |= _license(version.license)
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": suite or "not named", "type": suite or "unknown"},
            "metrics": [{"type": metric, "name": key, "value": value}],
        }
        for key, value in sorted(version.metrics.items())
        for suite, _, metric in [key.rpartition("/")]
    ]
    if results:
        front["model-index"] = [{"name": version.name, "results": results}]
    return front


def _license(text: str) -> dict[str, str]:
    """The hub takes some identifiers, in lower case; any other licence is `other`, with its name beside it."""
    name = text.lower().removesuffix("-only")
    if name in _HUB_LICENSES.split():
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "other"}


def _card(version: VersionView) -> str:
    rows = {"version": version.ref, "content": f"sha256:{version.content_digest}", "base": version.base}
    rows |= {"rank": str(version.rank), "dtype": version.dtype, "trained on": version.dataset or "not said"}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"\n# {version.name}\n\nA LoRA adapter, as adapterctl keeps it.\n\n| | |\n|---|---|\n{table}"


def _check_spelling(registry: RegistryAPI, versions: Sequence[VersionView], spelling: str) -> None:
    """Raises `Refused` where `spelling` is not known to mean the base of every version."""
    meant = {base.id for base, spellings in registry.bases() if spelling in (base.name, *spellings)}
    for version in versions:
        if version.base_id not in meant:
            raise Refused(
                f"{version.ref} is on {version.base}, which is not known to be {spelling}",
                hint=f"if it is: adapterctl base alias {spelling} {version.base}",
            )


def _base(version: VersionView, config: Mapping[str, Any]) -> str:
    """What the adapter's config calls the base, else what the registry does."""
    return str(config.get("base_model_name_or_path") or version.base)


def _name_base(files: Path, base: str) -> None:
    """Let the config call the base so; the content digest does not cover that."""
    config = _config(files)
    if config.get("base_model_name_or_path") != base:
        config["base_model_name_or_path"] = base
        (files / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(files: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((files / CONFIG_FILE).read_bytes())
    return config


def _keep(files: Path, *names: str) -> None:
    for path in files.iterdir():
        if path.name not in names:
            path.unlink()
