"""From a reference to the one version it means, once: the only place where names, aliases and digests are looked up.

A stage is read from the ledger, which decides. Unknown names come back with the nearest known ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from ..domain.errors import InvalidInput, NotFound
from ..domain.refs import Ref
from ..domain.version import AdapterVersion
from ..ports import Ledger


def resolve(ledger: Ledger, ref: Ref, *, removed: bool = False) -> AdapterVersion:
    """The version that `ref` means now; a bare name means the newest live version.

    Raises:
        NotFound: no such adapter, version, stage or digest; or it was removed and `removed` is False.
        InvalidInput: a digest prefix that fits several versions.
    """
    if ref.number is not None and (numbered := ledger.version_by_number(ref.name, ref.number)) is not None:
        return _unless_removed(ledger, numbered, removed=removed)  # one look is enough for most references
    adapter_id = known_adapter(ledger, ref.name)
    version: AdapterVersion | None = None
    if ref.alias is not None:
        holder = ledger.stage_holder(adapter_id, ref.alias)
        version = ledger.version(holder) if holder else None
    elif ref.digest is not None:
        version = _by_digest(ledger, ref)
    elif ref.number is None:
        newest = ledger.newest([ref.name]).get(ref.name)
        version = ledger.version_by_number(ref.name, newest) if newest is not None else None
    if version is None:
        raise NotFound(f"there is no {ref}", hint=_what_there_is(ledger, ref.name, adapter_id))
    return _unless_removed(ledger, version, removed=removed)


def _unless_removed(ledger: Ledger, version: AdapterVersion, *, removed: bool) -> AdapterVersion:
    if version.state == "removed" and not removed:
        hint = _what_there_is(ledger, version.name, version.adapter_id)
        raise NotFound(f"{version.label} was removed", hint=hint)
    return version


def known_adapter(ledger: Ledger, name: str) -> str:
    """The id of the adapter `name`. Raises `NotFound` with a did-you-mean."""
    adapter_id = ledger.adapter_id(name)
    if adapter_id is None or not ledger.has_versions(name):
        names = ledger.adapter_names()
        if (now := ledger.former_names().get(name)) is not None:
            raise NotFound(f"there is no adapter {name!r} any more", hint=f"it is called {now} now")
        hint = did_you_mean(name, names) or "`adapterctl ls` shows what there is"
        raise NotFound(f"there is no adapter {name!r}", hint=hint)
    return adapter_id


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the known words that are nearest; empty where none is near."""
    near = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _by_digest(ledger: Ledger, ref: Ref) -> AdapterVersion | None:
    found = ledger.versions_by_digest(str(ref.digest), ref.name)
    if len(found) > 1 and len({version.spec.content_digest for version in found}) > 1:
        labels = ", ".join(version.label for version in found)
        raise InvalidInput(f"{ref} fits {labels}", hint="give more digits of the digest")
    return found[-1] if found else None


def _what_there_is(ledger: Ledger, name: str, adapter_id: str) -> str:
    numbers = [f"v{number}" for number in ledger.numbers(name)]
    stages = sorted(ledger.stages([adapter_id]).get(adapter_id, {}))
    if not numbers:
        return f"{name} has no version left"
    shown = numbers if len(numbers) <= 8 else [*numbers[:2], "…", *numbers[-2:]]
    return f"{name} has {', '.join(shown)}" + (f" and the stages {', '.join(stages)}" if stages else " and no stage")
