"""Signatures of versions and of heads: who vouches for them. Made on the caller's machine, where the key is, and by no
server.

Ed25519 (RFC 8032): over a DSSE envelope for a version, over the canonical JSON of a head. Keys are PEM files, as
`openssl genpkey -algorithm ed25519` writes them; this program makes none and keeps none.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..registry.domain.digest import canonical_json
from ..registry.domain.errors import Corrupt, InvalidInput, Refused
from ..registry.domain.refs import Ref
from ..registry.domain.signature import PAYLOAD_TYPE, Envelope, PublicKey, Seal, pae
from ..registry.domain.stage import Head, read_head

if TYPE_CHECKING:
    from ..registry.api import RegistryAPI, VersionView

# openssl writes over what is there: a name that is not yet that of a key
_MAKE = "openssl genpkey -algorithm ed25519 -out new.key && openssl pkey -in new.key -pubout -out new.pub"


def sign_version(asked: Ref, version: VersionView, key: Path) -> tuple[Envelope, PublicKey]:
    """The envelope that says what `version` is, signed by the private key in the file `key`, and its public key.

    Raises `Refused` where the registry told of another version than was `asked` for.
    """
    from ..registry.services.signatures import statement_of_view  # deferred: help signs nothing

    _check_asked(asked, version)
    private = _private(key)
    body = canonical_json(statement_of_view(version))
    public = _public(private.public_key())
    seal = Seal(base64.b64encode(private.sign(pae(PAYLOAD_TYPE, body))).decode(), public.id)
    return Envelope(base64.b64encode(body).decode(), PAYLOAD_TYPE, (seal,)), public


def signature_of(asked: Ref, version: VersionView, key: Path) -> Envelope:
    """The signature of `version` by the public key in the file `key`, held against what is told of the version here.

    Raises `Refused` where there is none that holds, with what is wrong with it, and where another version was `asked`
    for.
    """
    from ..registry.services.signatures import fault, statement_of_view  # deferred: help checks nothing

    _check_asked(asked, version)
    public = _public(_public_file(key))
    expected = statement_of_view(version)
    faults = [
        (each.envelope, fault(public, each.envelope, expected))
        for each in version.signatures
        if each.keyid == public.id
    ]
    for envelope, wrong in faults:
        if not wrong:
            return envelope
    signed = f"what {key.name} signed does not count: {faults[-1][1]}" if faults else f"{key.name} did not sign it"
    raise Refused(
        f"{version.ref} has no signature by that key: {signed}",
        hint=f"`adapterctl show {version.ref}` tells its signatures",
    )


def pull_signed(registry: RegistryAPI, asked: Ref, folder: Path, key: Path) -> VersionView:
    """Pull what the public key in the file `key` signed. Nothing gets the name `folder` before that is known.

    Held against what the registry told as it sent the files, which need not be what it told before.
    """
    from ..registry.services.staging import new_folder  # deferred: help copies nothing

    with new_folder(folder) as apart:
        version = registry.pull(asked, apart)
        signature_of(asked, version, key)
    return version


def _check_asked(asked: Ref, version: VersionView) -> None:
    """A signature of one version vouches for no other, which a server could send instead, and for all of its files."""
    from ..registry.services.pull import check_below  # deferred: help checks nothing

    check_below(version.ref, version.files)
    if not version.files:
        raise Corrupt(f"{version.ref} lists no files", hint="do not trust its server")
    number, digest = asked.number or version.number, asked.digest or version.content_digest
    if (asked.name, number) != (version.name, version.number) or not version.content_digest.startswith(digest):
        raise Refused(f"asked for {asked}, the registry tells of {version.ref}", hint="do not trust that server")


def sign(head: Head, key: Path) -> Head:
    """The head with a signature by the private key in the file `key`."""
    return replace(head, signature=base64.b64encode(_private(key).sign(head.signed_bytes)).decode())


def signature_findings(text: str, key: Path) -> list[str]:
    """What is wrong with the signature of an exported head, by the public key in the file `key`; mostly nothing."""
    from cryptography.exceptions import InvalidSignature  # deferred: see _private

    public = _public_file(key)
    head = read_head(text)
    if isinstance(head, str) or head.signature is None:
        return ["the head is not signed: anyone could have written it"]
    try:
        public.verify(base64.b64decode(head.signature, validate=True), head.signed_bytes)
    except (InvalidSignature, binascii.Error):
        return [f"the signature of the head is not by {key.name}: the head was changed, or another key signed it"]
    return []


def _private(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # deferred: few things are signed
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return _load(path, lambda pem: load_pem_private_key(pem, password=None), Ed25519PrivateKey, "private")


def _public_file(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # deferred: see _private
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found = _load(path, load_pem_public_key, Ed25519PublicKey, "public")
    if _public(found).is_anyones:
        raise InvalidInput(f"{path} holds a key by which anyone can sign", hint="do not trust whoever gave it to you")
    return found


def _public(key: Any) -> PublicKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # deferred: see _private

    return PublicKey(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _load(path: Path, read: Any, kind: type[Any], what: str) -> Any:
    """The Ed25519 key in a PEM file. Raises `InvalidInput` for anything else, and for an encrypted one."""
    from cryptography.exceptions import UnsupportedAlgorithm  # deferred: see _private

    try:
        found = read(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", hint=_MAKE) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError where it asks for a password
        raise InvalidInput(f"{path} holds no {what} key that can be used: {error}", hint=_MAKE) from error
    if not isinstance(found, kind):
        raise InvalidInput(f"{path} holds another kind of key, expected Ed25519", hint=_MAKE)
    return found
