"""Write the full model of a base and an adapter: W + s·B·A in every weight, from the files alone.

Written over `RegistryAPI`, so the adapter may be in the registry of this machine or in a server's; the base is a folder
of this machine, and all is computed here. The new model waits in a hidden neighbour of its folder until it is whole and
proved, and gets its name in one step. What a kill left there is removed by the next one who writes to the same place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import BakedView, RegistryAPI, VersionView
from ..domain.adapter import check_dtype
from ..domain.bake_plan import INDEX_FILE, WEIGHTS_FILE, BakePlan, BaseTensor, baked_config, plan_bake
from ..domain.digest import file_digest
from ..domain.errors import InvalidAdapter, InvalidInput, NotFound, Recalled, Refused, Unavailable
from ..domain.header import read_header
from ..domain.refs import Ref, is_below
from ..domain.version import Base, FileRecord
from ..settings import Settings
from . import bases
from .locate_base import locate_base
from .register import CONFIG_FILE as ADAPTER_CONFIG
from .register import WEIGHTS_FILE as ADAPTER_WEIGHTS
from .register import inspect
from .staging import check_new, room_beside

if TYPE_CHECKING:
    from ..merging.bake import Baked, Rounding

RECEIPT_FILE = "adapterctl.json"
README_FILE = "README.md"
CONFIG_FILE = "config.json"
#: As transformers' `save_pretrained` had it for years.
SHARD_BYTES = 5_000_000_000
#: Unless told otherwise: so many compute as fast as one can hash what they read.
MOST_THREADS = 8
#: What of the base goes along: tokenizer, generation settings, templates, licence. No weights, and no Python.
_ALONG = (".bpe", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt", ".vocab")
_ALONG_NAMED = ("LICENSE", "LICENCE", "NOTICE")
_TEMPLATES = "additional_chat_templates"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _BaseModel:
    """A base as its folder has it: `files` are its weights files, links followed, in the order of their `names`."""

    folder: Path
    config: Mapping[str, Any]
    names: tuple[str, ...]
    files: tuple[Path, ...]
    tensors: tuple[BaseTensor, ...]


def bake(
    registry: RegistryAPI,
    ref: Ref,
    out: Path,
    *,
    settings: Settings,
    base: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> BakedView:
    """Write the base with a version in it to the folder `out`, which must not exist or be empty.

    Args:
        base: the base's folder; without it, where evaluations find it.
        dtype: of all floating tensors, a safetensors name; without it each keeps its own.
        force: take a folder that is not the base that the version is pinned to.
        on_progress: called with (bytes done, bytes in all).

    Raises `Refused` where adapter and base do not fit, or the base is another one; `Recalled` for a recalled version;
    `Conflict` for a folder that is taken; `Unavailable` for a full disk. Whatever is raised, `out` is as it was.
    """
    check_dtype(dtype)
    version = registry.version(ref, agreed=True)
    if version.recall:
        raise Recalled.of(version.ref, version.recall.ref, version.recall.reason, "bake another version")
    known, spellings = _known_base(registry, version)
    base = base or _find(known, spellings, settings)
    _check_places(base, out)
    found = bases.fingerprints(base, weights=False)
    differs = _check_base(known, base, found, force)
    model = _read_base(base)
    place = out.resolve()  # so that it has a name, also where it is `.`, and can be replaced, also where it is a link
    with room_beside(place) as stage:
        # by its number: what a stage means may change meanwhile
        registry.pull(Ref(version.name, number=version.number), stage / "adapter")
        facts = inspect(stage / "adapter", assume_converted=True)
        plan = plan_bake(facts, model.config, model.tensors, dtype=dtype)
        new = stage / "model"
        new.mkdir()
        baked = _bake(plan, stage / "adapter", model, new, shard_bytes, settings.threads, on_progress)
        if known.weights_digest:
            digest = bases.digest_of_files(_weights_digests(model, baked))
            differs += _check_base(known, base, {"weights_digest": digest}, force)
        receipt = _receipt(version, known, differs, model, plan, baked, dtype)
        files = [
            *baked.files,
            *_write_rest(new, model, plan, baked, dtype, receipt, _readme(version, known, plan, baked)),
        ]
        _publish(new, place)
    return BakedView(
        folder=str(out),
        ref=version.ref,
        base=known.name,
        dtype=dtype,
        size_bytes=sum(file.size_bytes for file in files),
        changed=plan.count("changed"),
        converted=plan.count("converted"),
        copied=plan.count("copied"),
        rounding=baked.rounding.share,
        untied=plan.untied,
        files=tuple(sorted(files, key=lambda file: file.path)),
        warnings=tuple(_warnings(known, model, differs, found)),
    )


def _known_base(registry: RegistryAPI, version: VersionView) -> tuple[Base, tuple[str, ...]]:
    for base, spellings in registry.bases():
        if base.id == version.base_id:
            return base, spellings
    return Base(id=version.base_id, name=version.base), ()


def _find(known: Base, spellings: Sequence[str], settings: Settings) -> Path:
    try:
        return locate_base(known, spellings, home=settings.home, base_paths=settings.base_paths)
    except Unavailable as error:
        raise Unavailable(error.message, hint="say where: --base DIR") from error


def _check_places(base: Path, out: Path) -> None:
    check_new(out)
    if base.resolve() in (out.resolve(), *out.resolve().parents):
        raise InvalidInput(f"{out} is in the folder of the base, which is only read", hint="give a folder elsewhere")


def _check_base(known: Base, folder: Path, found: Mapping[str, str], force: bool) -> list[str]:
    """What differs from the pins of the base. Raises `Refused` where that is something, unless forced."""
    contrary = [pin.replace("_", " ") for pin in known.contrary_pins(Base(known.id, known.name, **found))]
    if contrary and not force:
        raise Refused(
            f"{folder} is not the base {known.name}: {', '.join(contrary)} differ from what it is pinned to",
            hint="give the folder of that base, or --force if this one is meant",
        )
    return contrary


def _read_base(folder: Path) -> _BaseModel:
    """Raises `InvalidInput` for a folder without a model, `Refused` for weights that are broken or incomplete."""
    config = _read_json(folder / CONFIG_FILE)
    names, expected = _weights_files(folder)
    tensors: list[BaseTensor] = []
    for number, name in enumerate(names):
        try:
            header = read_header((folder / name).resolve())  # links are followed: the hub's cache is made of them
        except (InvalidAdapter, NotFound) as error:
            hint = "fetch it again, or save the base with transformers"
            raise Refused(f"{folder / name} cannot be read: {error.message}", hint=hint) from error
        tensors += [BaseTensor(number, entry) for entry in header.tensors]
    keys = [tensor.entry.key for tensor in tensors]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if twice or not keys:
        what = f"{twice[0]} is in several files" if twice else "there are no tensors in it"
        raise Refused(f"{folder} is no base: {what}", hint="fetch it again, or save it with transformers")
    if missing := sorted(expected - set(keys)):
        raise Refused(
            f"{folder} is incomplete: {missing[0]} and {len(missing) - 1} others of {INDEX_FILE} are in no file",
            hint="fetch the base again",
        )
    return _BaseModel(folder, config, tuple(names), tuple((folder / name).resolve() for name in names), tuple(tensors))


def _weights_files(folder: Path) -> tuple[list[str], set[str]]:
    """The names of the weights files, and the tensors that an index announces; in transformers' order of preference."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE], set()
    if not (folder / INDEX_FILE).is_file():
        raise InvalidInput(
            f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            hint="give the folder of a whole model in safetensors; transformers' save_pretrained writes one",
        )
    listed = _read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) and is_below(name) for name in listed.values()):
        raise InvalidInput(f"{folder / INDEX_FILE} is no index of weights", hint="fetch the base again")
    return sorted(set(listed.values())), set(listed)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidInput(f"{path} is not there", hint="give the folder of a model that transformers saved") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", hint="fetch the base again") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} is no JSON object", hint="fetch the base again")
    return found


def _bake(
    plan: BakePlan,
    adapter: Path,
    model: _BaseModel,
    new: Path,
    shard_bytes: int,
    threads: int,
    on_progress: Progress,
) -> Baked:
    from ..merging.bake import bake as bake_weights  # deferred: numpy is for those who read tensors

    return bake_weights(
        plan,
        adapter / ADAPTER_WEIGHTS,
        model.files,
        new,
        shard_bytes=shard_bytes,
        threads=threads or min(MOST_THREADS, len(os.sched_getaffinity(0))),
        on_progress=on_progress,
    )


def _weights_digests(model: _BaseModel, baked: Baked) -> dict[str, str]:
    """Of every safetensors file in the base's folder, as a pin has them; those that were read are known."""
    known = dict(zip(model.files, baked.base, strict=True))
    return {
        path.name: known.get(path.resolve()) or file_digest(path) for path in sorted(model.folder.glob("*.safetensors"))
    }


def _receipt(
    version: VersionView,
    known: Base,
    differs: Sequence[str],
    model: _BaseModel,
    plan: BakePlan,
    baked: Baked,
    dtype: str | None,
) -> dict[str, Any]:
    """What was made of what, and how well: no name, time or host, so the same bake writes the same receipt."""
    from ..merging.blas import computed_with  # deferred: as above

    rounding = baked.rounding
    return {
        "v": 1,
        "adapter": {
            "ref": version.ref,
            "content_digest": version.content_digest,
            "recipe_digest": version.recipe_digest,
        },
        "base": {
            "name": known.name,
            "revision": known.revision,
            "files": dict(zip(model.names, baked.base, strict=True)),
            "differs": list(differs),
        },
        "dtype": dtype,
        "tensors": {kind: plan.count(kind) for kind in ("changed", "converted", "copied")},
        "untied": plan.untied,
        "rounding": {
            "error": rounding.error,
            "delta": rounding.delta,
            "share": rounding.share,
            "worst": {"tensor": rounding.worst, "share": rounding.worst_share},
        },
        "files": {file.path: {"size": file.size_bytes, "sha256": file.sha256} for file in baked.files},
        "fingerprint": computed_with(),
    }


def _readme(version: VersionView, known: Base, plan: BakePlan, baked: Baked) -> str:
    """A model card that says what the receipt says."""
    base = json.dumps(known.name, ensure_ascii=False)
    recipe = f"* recipe: `sha256:{version.recipe_digest}`\n" if version.recipe_digest else ""
    untied = f"* `{plan.untied}` is a tensor of its own: the base ties it to its embedding\n" if plan.untied else ""
    return f"""---
base_model: {base}
base_model_relation: finetune
library_name: transformers
tags:
- adapterctl
- lora
---

# {version.name}

A full model: a LoRA adapter baked into its base by adapterctl, W + s·B·A in float64, rounded once.

* adapter: `{version.ref}`, content `sha256:{version.content_digest}`
{recipe}* tensors: {plan.count("changed")} changed, {plan.count("converted")} converted, {plan.count("copied")} copied
* rounding: {_share(baked.rounding)}
{untied}
What it was made of, with the digests of all weights files, stands in `{RECEIPT_FILE}`.
"""


def _share(rounding: Rounding) -> str:
    return f"{rounding.share:.2e} of the delta, {rounding.worst_share:.2e} in `{rounding.worst}`"


def _write_rest(
    new: Path,
    model: _BaseModel,
    plan: BakePlan,
    baked: Baked,
    dtype: str | None,
    receipt: Mapping[str, Any],
    readme: str,
) -> list[FileRecord]:
    """Everything but the weights, durable."""
    names = []
    for source in _along(model.folder):
        name = source.relative_to(model.folder).as_posix()
        (new / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, new / name)
        names.append(name)
    texts = {README_FILE: readme, RECEIPT_FILE: _json(receipt, sort=True)}
    if len(baked.files) > 1:
        index = {"metadata": {"total_size": baked.tensor_bytes}, "weight_map": dict(sorted(baked.weight_map.items()))}
        texts[INDEX_FILE] = _json(index)
    if (config := baked_config(model.config, plan, dtype)) is not None:
        texts[CONFIG_FILE] = _json(config)
    for name, text in texts.items():
        (new / name).write_text(text, encoding="utf-8")
    found = []
    for name in sorted({*names, *texts}):
        with (new / name).open("rb") as file:
            os.fsync(file.fileno())
        found.append(FileRecord(name, (new / name).stat().st_size, file_digest(new / name)))
    return found


def _along(folder: Path) -> list[Path]:
    """The files of the base that the new model needs as well, besides its weights and what is written anew."""
    beside = [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]
    ours = {RECEIPT_FILE, ADAPTER_CONFIG}
    return sorted(
        path
        for path in beside
        if path.is_file()
        and not path.name.startswith(".")
        and (path.suffix in _ALONG or path.name.startswith(_ALONG_NAMED))
        and not path.name.endswith(".index.json")
        and path.name not in ours
    )


def _json(value: Mapping[str, Any], *, sort: bool = False) -> str:
    return json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n"


def _publish(new: Path, out: Path) -> None:
    """Give the finished folder its name, durably."""
    from ..merging.tensors import sync_folder  # deferred: as above

    sync_folder(new)
    check_new(out)
    new.replace(out)
    sync_folder(out.parent)


def _warnings(known: Base, model: _BaseModel, differs: Sequence[str], found: Mapping[str, str]) -> Iterator[str]:
    if differs:
        yield f"{model.folder} is not the base {known.name}: {', '.join(differs)} differ; baked by force"
    elif not found.keys() & known.pins.keys():
        yield (
            f"the base {known.name} is not pinned, so {model.folder} was checked by names and shapes alone;"
            f" `adapterctl base add {known.name} --folder {model.folder}` pins it"
        )
    if "auto_map" in model.config:
        yield "config.json names Python files of the base (auto_map), which are not copied: add those that you trust"
