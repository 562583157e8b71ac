"""Does a signature hold: is it by that key, and of this version as it is recorded now?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..api import VersionView
from ..domain.errors import InvalidInput
from ..domain.signature import Envelope, PublicKey, Signature, difference, statement
from ..domain.verdict import Signed
from ..domain.version import AdapterVersion
from ..ports import Ledger

OTHER = "it is not by that key, or was changed since"


def statement_of(version: AdapterVersion) -> dict[str, Any]:
    """What has to be signed of a version, as the ledger has it."""
    return statement(
        version=version.label,
        content=version.spec.content_digest,
        base=version.spec.base.id,
        recipe=version.spec.recipe_digest,
        files=version.placement.files,
    )


def statement_of_view(view: VersionView) -> dict[str, Any]:
    """The same of a version as a registry tells it to those who sign and those who check."""
    return statement(
        version=f"{view.name}:v{view.number}",
        content=view.content_digest,
        base=view.base_id,
        recipe=view.recipe_digest,
        files=view.files,
    )


def fault(key: PublicKey, envelope: Envelope, expected: Mapping[str, Any]) -> str:
    """Why an envelope is no signature of the expected statement by `key`, as the end of a sentence; or nothing.

    Nothing of it is read before the signature holds.
    """
    try:
        message, sigs = envelope.signed_bytes, envelope.sigs()
    except InvalidInput as error:
        return error.message
    if not any(_holds(key, message, sig) for sig in sigs):
        return OTHER
    return difference(envelope, expected)


def signed(ledger: Ledger, version: AdapterVersion) -> list[tuple[Signature, str]]:
    """Every signature that is kept of a version, the earliest first, with what is wrong with it."""
    expected = statement_of(version)
    return [(each, fault(each.key, each.envelope, expected)) for each in ledger.signatures(version.id)]


def evidence_of(ledger: Ledger, version: AdapterVersion, keys: Collection[str]) -> tuple[Signed, ...]:
    """What the keys of these ids signed of a version; what others did changes no verdict."""
    found = signed(ledger, version) if keys else ()
    return tuple(Signed(signature.key.id, wrong) for signature, wrong in found if signature.key.id in keys)


def _holds(key: PublicKey, message: bytes, sig: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # deferred: few versions are signed
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(sig, message)
    except (InvalidSignature, ValueError):
        return False
    return True
