"""Facts of record: a base, a version of an adapter, and the edges between versions. Appended, never edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from .adapter import AdapterFacts

VersionKind = Literal["import", "train", "merge"]
EdgeKind = Literal["merge", "trained_from", "supersedes", "imported"]
#: What a base may be pinned by.
PINS = ("revision", "config_digest", "weights_digest", "tokenizer_digest")


@dataclass(frozen=True, slots=True)
class Base:
    """The model an adapter applies to. Spellings (hub id, path, ...) are aliases that lead to one id."""

    id: str
    name: str
    revision: str | None = None
    config_digest: str | None = None
    weights_digest: str | None = None
    tokenizer_digest: str | None = None

    @property
    def pins(self) -> dict[str, str]:
        return {pin: value for pin in PINS if (value := getattr(self, pin))}

    def contrary_pins(self, other: Base) -> list[str]:
        """Those that both have, and have otherwise: then they are two models."""
        return [pin for pin, value in self.pins.items() if other.pins.get(pin, value) != value]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One stored file of a version, as the manifest lists it."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpec:
    """What was registered, without its bulk: all that a listing, a search or a move of a stage looks at.

    `params`, `tags` and `dataset` are the caller's own words; `recipe_digest` is set for merges only.
    """

    adapter: str
    kind: VersionKind
    content_digest: str
    base: Base
    license: str | None = None
    source: str | None = None
    dataset: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    recipe_digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion(VersionSpec):
    """Everything that is known before a version gets its number; the input of registration.

    `facts` describe the staged weights, `norms` the Frobenius norm of each module's scaled delta; `metrics` are the
    caller's own. `recipe` (canonical JSON object) and `receipt` are set for merges only.
    """

    facts: AdapterFacts
    norms: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    receipt: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class VersionDetail:
    """The bulk of a version, read only where it is needed: a 7B adapter's facts alone are 100 kB of JSON."""

    facts: AdapterFacts
    norms: Mapping[str, float]
    recipe: Mapping[str, Any] | None
    receipt: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a listing shows of the detail; taken once, at registration. `loss` is the one that the receipt measured."""

    rank: int
    dtype: str
    modules: int
    parameters: int
    method: str | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where MLflow keeps a version: its number there, the LoggedModel, the run and the artifact location."""

    number: int
    model_id: str
    run_id: str
    location: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version: what was registered and where it lies. `id` is a UUIDv7 of ours.

    Its bulk (`VersionDetail`) is a read of its own: `Ledger.detail`.
    """

    id: str
    adapter_id: str
    created_at: float
    created_by: str
    state: Literal["live", "removed"]
    spec: VersionSpec
    summary: Summary
    placement: Placement

    @property
    def name(self) -> str:
        return self.spec.adapter

    @property
    def number(self) -> int:
        return self.placement.number

    @property
    def label(self) -> str:
        return f"{self.spec.adapter}:v{self.placement.number}"


# Not frozen: a walk makes thousands of them, and freezing makes each three times as slow to make.
@dataclass(unsafe_hash=True, slots=True)
class Edge:
    """`child` descends from `parent`; `position` is the parent's place in the recipe, its order matters."""

    child_id: str
    position: int
    parent_id: str
    kind: EdgeKind
    weight: float | None = None
    recipe_digest: str | None = None


def summarise(spec: NewVersion) -> Summary:
    """The few figures of the detail that listings show."""
    return Summary(
        rank=spec.facts.max_rank,
        dtype="+".join(spec.facts.dtypes),
        modules=len(spec.facts.modules),
        parameters=spec.facts.parameters,
        method=spec.recipe["method"] if spec.recipe else None,
        loss=spec.receipt.get("loss") if spec.receipt else None,
    )


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names, whether it is there or not; None where it lies elsewhere."""
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(location) if location.startswith("/") else None
