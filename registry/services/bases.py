"""Bases: the models that adapters apply to, known by any number of spellings and pinned by what is in their folder.

Two adapters may be merged only where their bases have one id, so a spelling is never guessed to mean a known base: an
unknown one makes a base of its own, without pins, and `alias` or `merge` say later that both are one. A base's id is
the first spelling it was known by, so that it is the same in every registry. Paths in an adapter's config are names;
nothing is ever read from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..domain.adapter import AdapterFacts
from ..domain.digest import file_digest, json_digest
from ..domain.errors import InvalidInput, NotFound, Refused
from ..domain.version import Base
from ..ports import Ledger
from .resolve import did_you_mean

MAX_NAME = 512

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
#: Fields of config.json that tell where and by what it was saved, not what the model is.
_INCIDENTAL_FIELDS = ("_name_or_path", "transformers_version")


def base_of(ledger: Ledger, facts: AdapterFacts, named: str | None) -> tuple[Base, bool]:
    """The base that an adapter applies to, and whether it is known; `named` by the caller wins over the config.

    An unknown base is returned unpinned and is not stored: `Ledger.add_base` does that when the version is sure.
    Raises `InvalidInput` when neither names one.
    """
    if named is None and not facts.base_name:
        raise InvalidInput("the config names no base model", hint="say which one: --base ORG/MODEL")
    revision = facts.base_revision if named is None and facts.base_revision != "main" else None
    name = _checked(facts.base_name if named is None else named)
    spelling = f"{name}@{revision}" if revision else name
    known = ledger.find_base(spelling)
    if known is not None:
        return known, True
    return Base(id=spelling, name=spelling, revision=revision), False


def add_base(ledger: Ledger, name: str, *, revision: str | None = None, pins: Mapping[str, str] | None = None) -> Base:
    """Make a base, or fill in the pins of a known one; `pins` are what `fingerprints` found in its folder.

    Raises `Refused` when the base is pinned to something else already.
    """
    spelling = _checked(name)
    new = Base(id=spelling, name=spelling, revision=revision, **(pins or {}))
    known = ledger.find_base(spelling)
    if known is not None:
        _check_pins(known, new)
        new = replace(new, id=known.id, name=known.name)
    stored = ledger.add_base(new, [spelling])
    _check_pins(stored, new)  # again: another process may have pinned it meanwhile
    return stored


def alias_base(ledger: Ledger, spelling: str, base: str) -> Base:
    """Let `spelling` mean the known `base`. Raises `Refused` when it means another one: those are merged instead."""
    target = known_base(ledger, base)
    meant = ledger.find_base(_checked(spelling))
    if meant is not None and meant.id != target.id:
        raise Refused(
            f"{spelling!r} means the base {meant.name} already",
            hint=f"if both are one model: adapterctl base merge {target.name!r} {meant.name!r}",
        )
    ledger.alias_base(spelling, target.id)
    return target


def merge_bases(ledger: Ledger, keep: str, drop: str) -> Base:
    """Say that two bases are one model. Raises `Refused` when their pins contradict each other."""
    kept, dropped = known_base(ledger, keep), known_base(ledger, drop)
    if kept.id == dropped.id:
        return kept
    _check_pins(kept, dropped)
    ledger.merge_bases(kept.id, dropped.id)
    return known_base(ledger, kept.id)


def known_base(ledger: Ledger, spelling: str) -> Base:
    """The base that `spelling` means. Raises `NotFound` with a did-you-mean."""
    found = ledger.find_base(spelling)
    if found is not None:
        return found
    spellings = sorted({base.name for base in ledger.bases()} | set(ledger.base_aliases()))
    hint = did_you_mean(spelling, spellings) or "`adapterctl base ls` shows what there is"
    raise NotFound(f"there is no base {spelling!r}", hint=hint)


def fingerprints(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """Digests of a model folder: `config_digest`, and of weights (safetensors) and tokenizer where they are there.

    The folder is the caller's own; links in it are followed, as the hub's cache is made of links.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidInput(f"{folder} holds no config.json", hint="give the folder of a model that transformers saved")
    found = {"config_digest": _config_digest(config)}
    if weights and (files := sorted(folder.glob("*.safetensors"))):
        found["weights_digest"] = _files_digest(files)
    if tokenizer := [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]:
        found["tokenizer_digest"] = _files_digest(tokenizer)
    return found


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One digest of several files, by name to SHA-256."""
    return json_digest([[name, digests[name]] for name in sorted(digests)])


def _config_digest(path: Path) -> str:
    try:
        fields = json.loads(path.read_bytes())
        return json_digest({key: value for key, value in fields.items() if key not in _INCIDENTAL_FIELDS})
    except (ValueError, RecursionError, AttributeError) as error:  # AttributeError: JSON, but no object
        raise InvalidInput(f"{path} is not a model config: {error}", hint="check the file") from error


def _files_digest(paths: list[Path]) -> str:
    return digest_of_files({path.name: file_digest(path) for path in paths})


def _check_pins(known: Base, new: Base) -> None:
    contrary = known.contrary_pins(new)
    if contrary:
        raise Refused(
            f"the base {known.name} is pinned otherwise: {', '.join(contrary).replace('_', ' ')} differ",
            hint="it is another model: give it a name of its own",
        )


def _checked(name: str) -> str:
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise InvalidInput(
            f"base name {name[:80]!r} is not allowed", hint=f"use printable text of at most {MAX_NAME} characters"
        )
    return name
