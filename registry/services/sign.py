"""Keep a signature that someone made of a version: checked first, then a row beside it in the chained history."""

from __future__ import annotations

from ..api import SignatureView
from ..domain.errors import Refused
from ..domain.signature import Envelope, read_public_key
from ..domain.version import AdapterVersion
from ..ports import Ledger
from .gates import asks_for_key
from .signatures import fault, signed, statement_of
from .views import signature_view


def sign(ledger: Ledger, version: AdapterVersion, envelope: Envelope, key: str, *, actor: str) -> SignatureView:
    """Keep `envelope` as a signature of `version` by the public key `key`; where that key signed before, add nothing.

    Raises `InvalidInput` for what is no envelope or no key, and `Refused` where the signature does not hold.
    """
    envelope.check()
    public = read_public_key(key)
    wrong = fault(public, envelope, statement_of(version))
    if wrong:
        raise Refused(
            f"that is no signature of {version.label} by the key {public.id[:16]}: {wrong}",
            hint=f"adapterctl sign {version.label} --key FILE makes one of what is recorded now",
        )
    for before, past in signed(ledger, version):
        if before.key == public and not past:
            return signature_view(before, "")
    # whoever may make versions can fill the places of one with keys of no weight: those that have some find one
    asked_for = asks_for_key(ledger, version.name, public.id)
    kept = ledger.add_signature(version.id, public, envelope, actor=actor, asked_for=asked_for)
    return signature_view(kept, "")
