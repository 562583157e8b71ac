"""Signed heads: who vouches for the end of a history. Done on the caller's machine, where the key is, and by no server.

Ed25519 (RFC 8032) over the canonical JSON of the head. Keys are PEM files, as `openssl genpkey -algorithm ed25519`
writes them; this program makes none and keeps none.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..registry.domain.errors import InvalidInput
from ..registry.domain.stage import Head, read_head

_MAKE = "openssl genpkey -algorithm ed25519 -out head.key && openssl pkey -in head.key -pubout -out head.pub"


def sign(head: Head, key: Path) -> Head:
    """The head with a signature by the private key in the file `key`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # deferred: few heads are signed
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = _load(key, lambda pem: load_pem_private_key(pem, password=None), Ed25519PrivateKey, "private")
    return replace(head, signature=base64.b64encode(private.sign(head.signed_bytes)).decode())


def signature_findings(text: str, key: Path) -> list[str]:
    """What is wrong with the signature of an exported head, by the public key in the file `key`; mostly nothing."""
    from cryptography.exceptions import InvalidSignature  # deferred: see sign
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = _load(key, load_pem_public_key, Ed25519PublicKey, "public")
    head = read_head(text)
    if isinstance(head, str) or head.signature is None:
        return ["the head is not signed: anyone could have written it"]
    try:
        public.verify(base64.b64decode(head.signature, validate=True), head.signed_bytes)
    except (InvalidSignature, binascii.Error):
        return [f"the signature of the head is not by {key.name}: the head was changed, or another key signed it"]
    return []


def _load(path: Path, read: Any, kind: type[Any], what: str) -> Any:
    """The Ed25519 key in a PEM file. Raises `InvalidInput` for anything else, and for an encrypted one."""
    from cryptography.exceptions import UnsupportedAlgorithm  # deferred: see sign

    try:
        found = read(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", hint=_MAKE) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError where it asks for a password
        raise InvalidInput(f"{path} holds no {what} key that can be used: {error}", hint=_MAKE) from error
    if not isinstance(found, kind):
        raise InvalidInput(f"{path} holds another kind of key, expected Ed25519", hint=_MAKE)
    return found
