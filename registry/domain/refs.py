"""How people name a version, a parent or a place that an adapter comes from. One grammar for every surface.

    version   NAME | NAME:vN | NAME:N | NAME@ALIAS | NAME@sha256:HEX | models:/NAME/N | models:/NAME@ALIAS
    parent    version[=WEIGHT]
    source    FOLDER | hf://ORG/REPO[/FOLDER]@REVISION | runs:/RUN_ID/PATH | models:/NAME/N

Versions are 1-based. Parsing never looks anything up; a bare name or an alias is resolved once by the registry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from .errors import InvalidInput

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,127}"
_NAME = re.compile(NAME_PATTERN)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_NOT_IN_A_PATH = re.compile(r"[%?#\\\x00-\x1f]")
_NUMBER = re.compile(r"v?([1-9][0-9]{0,8})")
_RESERVED_ALIAS = re.compile(r"latest|v[0-9]+")


@dataclass(frozen=True, slots=True)
class Ref:
    """A version as the caller wrote it; at most one of `number`, `alias`, `digest` is set, none means the newest."""

    name: str
    number: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.name}:v{self.number}"
        if self.alias is not None:
            return f"{self.name}@{self.alias}"
        if self.digest is not None:
            return f"{self.name}@sha256:{self.digest}"
        return self.name


@dataclass(frozen=True, slots=True)
class ParentRef:
    """One parent of a merge, with its weight (finite, not zero is checked by the preflight)."""

    ref: Ref
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a new adapter comes from; `location` is a folder, ORG/REPO, RUN_ID/PATH or NAME/VERSION."""

    kind: Literal["folder", "hub", "run", "model"]
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        prefix = {"folder": "", "hub": "hf://", "run": "runs:/", "model": "models:/"}[self.kind]
        return f"{prefix}{self.location}" + (f"@{self.revision}" if self.revision else "")


def check_name(name: str) -> str:
    """Return `name` or raise `InvalidInput`: MLflow itself accepts NUL, newlines and bidirectional marks."""
    if not is_name(name):
        raise InvalidInput(
            f"adapter name {name!r} is not allowed",
            hint="use lower-case letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit",
        )
    return name


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def check_alias(alias: str) -> str:
    """Return `alias` or raise `InvalidInput`; `latest` and `vN` are MLflow's own words."""
    if not _ALIAS.fullmatch(alias) or _RESERVED_ALIAS.fullmatch(alias):
        raise InvalidInput(
            f"stage or alias {alias!r} is not allowed",
            hint="use lower-case letters, digits, '_' and '-', starting with a letter; 'latest' and 'v1' are reserved",
        )
    return alias


def is_below(path: str) -> bool:
    """Whether a relative path of plain parts leads below the folder that it is joined to, whatever lies there."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def is_glob(text: str) -> bool:
    """Whether it may mean several adapters, where a name or a glob of them can be given."""
    return not {"*", "?", "["}.isdisjoint(text)


def is_like(name: str, globs: Iterable[str]) -> bool:
    """Whether the name of an adapter is like one of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def first_few(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c, d, e and 2 more`: names in a line that is read, of which there may be thousands."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def parse_ref(text: str) -> Ref:
    """Read a version reference. Raises `InvalidInput` with the grammar as hint."""
    if text.startswith("models:/"):
        return _parse_models_uri(text)
    name, at, pin = text.partition("@")
    if at:
        check_name(name)
        return _parse_pin(name, pin, text)
    name, colon, number = text.partition(":")
    check_name(name)
    return Ref(name, number=_parse_number(number, text)) if colon else Ref(name)


def parse_parent(text: str) -> ParentRef:
    """Read `REF[=WEIGHT]`. Raises `InvalidInput` for a weight that is not a finite number."""
    ref, equals, weight = text.rpartition("=")
    if not equals:
        return ParentRef(parse_ref(text))
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInput(f"weight {weight!r} of {text!r} is not a finite number", hint="write translate:v3=0.6")
    return ParentRef(parse_ref(ref), value)


def parse_source(text: str) -> Source:
    """Read where an adapter to register comes from. Does not touch the disk."""
    if text.startswith("hf://"):
        location, _, revision = text.removeprefix("hf://").partition("@")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", location, re.ASCII) or not is_below(location) or not revision:
            raise InvalidInput(
                f"{text!r} is not a pinned hub repository",
                hint="write hf://ORG/REPO@REVISION, or hf://ORG/REPO/FOLDER@REVISION",
            )
        return Source("hub", location, revision)
    if text.startswith("runs:/"):
        location = text.removeprefix("runs:/").strip("/")
        # MLflow reads the path as the end of a URI, where %2e%2e leads upwards too
        if "/" not in location or _NOT_IN_A_PATH.search(location) or not is_below(location):
            raise InvalidInput(
                f"{text!r} is not an artifact of a run", hint="write runs:/RUN_ID/PATH, without any of . .. % ? # \\"
            )
        return Source("run", location)
    if text.startswith("models:/"):
        return Source("model", text.removeprefix("models:/"))
    if "://" in text:
        raise InvalidInput(
            f"{text!r} is not a source", hint="give a folder, hf://ORG/REPO@REVISION or runs:/RUN_ID/PATH"
        )
    return Source("folder", text)


def _parse_models_uri(text: str) -> Ref:
    body = text.removeprefix("models:/")
    if "@" in body:
        name, _, alias = body.partition("@")
        return _parse_pin(check_name(name), alias, text)
    name, slash, number = body.partition("/")
    check_name(name)
    if not slash:
        raise InvalidInput(f"{text!r} names no version", hint="write models:/NAME/N or models:/NAME@ALIAS")
    if number.lower() in {"production", "staging"}:
        return Ref(name, alias=number.lower())
    return Ref(name, number=_parse_number(number, text))


def _parse_pin(name: str, pin: str, text: str) -> Ref:
    if not pin.startswith("sha256:"):
        return Ref(name, alias=check_alias(pin))
    digest = pin.removeprefix("sha256:")
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"digest in {text!r} is not 8 to 64 hex digits", hint="see `adapterctl show NAME`")
    return Ref(name, digest=digest)


def _parse_number(number: str, text: str) -> int:
    match = _NUMBER.fullmatch(number)
    if not match:
        raise InvalidInput(f"version {number!r} in {text!r} is not vN", hint="versions are 1-based: translate:v3")
    return int(match.group(1))
