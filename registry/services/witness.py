"""What a server saw being done in MLflow past us, kept in the history of the adapter with who did it.

MLflow's requests pass our door, so whoever moves an alias or deletes a version is known there, and nowhere else. A note
moves nothing: the ledger still decides, and `doctor` names the difference. What our own verbs and workers do through
the same door agrees with the ledger, and leaves no note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ports import Ledger

_MAX_REASON = 300


def witness(ledger: Ledger, stages: Sequence[str], deed: str, said: Mapping[str, Any], *, actor: str) -> None:
    """`deed` is the method and the end of the path of a request that MLflow granted, `said` its body."""
    name = str(said.get("name"))
    adapter_id = ledger.adapter_id(name)
    # a note would keep the name of an adapter that never got a version
    if adapter_id is None or not ledger.newest([name]):
        return
    stage, number, reason = "", None, ""
    if deed.endswith("registered-models/alias"):
        alias = str(said.get("alias"))
        holder = ledger.stage_holder(adapter_id, alias)
        if holder is None and alias not in stages:
            return
        stage, number = alias, _number(said) if deed.startswith("POST") else None
        held = ledger.version(holder) if holder is not None else None
        if number == (held.number if held is not None else None):
            return
        reason = f"alias pointed to v{number}" if number is not None else "alias deleted"
    elif deed == "POST registered-models/rename":
        reason = f"renamed to {said.get('new_name')}"
    elif deed == "DELETE registered-models/delete":
        count = len(ledger.numbers(name))
        reason = f"deleted, with {count} versions" if count else ""
    elif deed == "DELETE model-versions/delete":
        number = _number(said)
        version = ledger.version_by_number(name, number) if number is not None else None
        reason = f"v{number} deleted" if version is not None and version.state == "live" else ""
    elif deed == "POST model-versions/create" and not _is_ours(said):
        reason = f"a version made of {said.get('source')}"
    if not reason:
        return
    version = ledger.version_by_number(name, number) if number is not None else None
    ledger.record_note(
        adapter_id,
        stage,
        version_id=version.id if version is not None else None,
        action="mlflow",
        actor=actor,
        reason=reason[:_MAX_REASON],
    )


def _number(said: Mapping[str, Any]) -> int | None:
    text = str(said.get("version"))
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _is_ours(said: Mapping[str, Any]) -> bool:
    """Whether a registration or a merge makes the version: its tags say so."""
    tags = said.get("tags")
    return isinstance(tags, list) and any(
        isinstance(tag, dict) and tag.get("key") == "adapterctl.version_id" for tag in tags
    )
