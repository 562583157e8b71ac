"""Keys, and envelopes signed with them, made with `cryptography` alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from adapterctl.registry.domain.digest import canonical_json
from adapterctl.registry.domain.signature import PAYLOAD_TYPE, Envelope, PublicKey, Seal, pae


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def public(key: Ed25519PrivateKey) -> PublicKey:
    return PublicKey(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def write_key(folder: Path, name: str) -> Ed25519PrivateKey:
    """Write NAME.key and NAME.pub as openssl does."""
    key = new_key()
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key


def seal(said: Mapping[str, Any] | bytes, key: Ed25519PrivateKey, *, payload_type: str = PAYLOAD_TYPE) -> Envelope:
    body = said if isinstance(said, bytes) else canonical_json(said)
    sig = base64.b64encode(key.sign(pae(payload_type, body))).decode()
    return Envelope(base64.b64encode(body).decode(), payload_type, (Seal(sig, public(key).id),))
