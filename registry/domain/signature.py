"""Signatures of versions: what is signed, in which envelope, by which kind of key.

A DSSE envelope (https://github.com/secure-systems-lab/dsse, v1) around an in-toto Statement v1
(https://github.com/in-toto/attestation) whose subjects are the files of the manifest. The predicate says which version
they are. Pure: the arithmetic of Ed25519 is in `services/signatures.py`, private keys are with their owners alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import AdapterctlError, InvalidInput

if TYPE_CHECKING:
    from .version import FileRecord

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:adapterctl:version:v1"
#: Of an envelope, in characters of base64, and in signatures. A version has two or three files.
MAX_PAYLOAD, MAX_SEALS, MAX_SEAL, MAX_TYPE = 1 << 16, 16, 256, 256
#: What stands before the id of the key in the row of the history that says that a version was signed.
SIGNED_BY = "by the key "
#: Of one version, so that it can always be shown.
MAX_SIGNATURES = 64
#: What is before the 32 bytes of an Ed25519 key in its SubjectPublicKeyInfo (RFC 8410): always the same.
_SPKI = bytes.fromhex("302a300506032b6570032100")
#: How the base64 of a private one begins: PKCS #8 as RFC 8410 has it, without the public key and with it.
_PRIVATE = ("MC4CAQAwBQYDK2Vw", "MFECAQEwBQYDK2Vw")
#: The y of the points of small order, in every encoding that is read. By such a key anyone can sign anything.
#: Source: Chalkias, Garillot, Nikolaenko 2020, https://eprint.iacr.org/2020/1244
_P = 2**255 - 19
_Y8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER = frozenset((0, 1, _P - 1, _P, _P + 1, _Y8, _P - _Y8))
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 key, as the DER of its SubjectPublicKeyInfo."""

    der: bytes

    @property
    def id(self) -> str:
        """The SHA-256 of the DER: 64 hex digits, as `openssl pkey -pubin -outform DER | sha256sum` prints them."""
        return hashlib.sha256(self.der).hexdigest()

    @property
    def raw(self) -> bytes:
        return self.der.removeprefix(_SPKI)

    @property
    def is_anyones(self) -> bool:
        """Whether anyone can sign by it, without a private key."""
        return int.from_bytes(self.raw, "little") % 2**255 in _SMALL_ORDER  # above is the sign of x

    def __str__(self) -> str:
        """One line: what is between the first and the last line of its PEM file."""
        return base64.b64encode(self.der).decode()


def read_public_key(text: str) -> PublicKey:
    """An Ed25519 key in PEM, or the base64 between its lines. Raises `InvalidInput` with what was expected."""
    body = text.strip().removeprefix(_BEGIN).removesuffix(_END)
    try:
        der = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError for what is not ASCII
        der = b""
    if len(der) != len(_SPKI) + 32 or not der.startswith(_SPKI):
        # of what might be a secret no more is told again than tells which text it was
        private = "PRIVATE KEY" in text or body.startswith(_PRIVATE)
        what = "a private key" if private else repr(text.strip()[:12])
        hint = "openssl pkey -in my.key -pubout prints it; on one line it is what stands between BEGIN and END"
        raise InvalidInput(f"is {what}, expected a public Ed25519 key in PEM or base64", hint=hint)
    key = PublicKey(der)
    if key.is_anyones:
        raise InvalidInput("is a key by which anyone can sign", hint="do not trust whoever gave it to you")
    return key


@dataclass(frozen=True, slots=True)
class Seal:
    """One signature of an envelope. `keyid` is a hint that nothing vouches for."""

    sig: str
    keyid: str = ""


@dataclass(frozen=True, slots=True)
class Envelope:
    """As DSSE writes it in JSON, base64 and names included."""

    payload: str
    payloadType: str
    signatures: tuple[Seal, ...]

    @property
    def body(self) -> bytes:
        """What was signed, to be read only once the signature holds. Raises `InvalidInput` where it is no base64."""
        return _unbase64(self.payload, "payload")

    @property
    def signed_bytes(self) -> bytes:
        return pae(self.payloadType, self.body)

    def sigs(self) -> list[bytes]:
        return [_unbase64(seal.sig, "sig") for seal in self.signatures]

    def check(self) -> None:
        """Raise `InvalidInput` for what is too large to be kept, or no base64."""
        if not 1 <= len(self.signatures) <= MAX_SEALS:
            raise InvalidInput(f"the envelope has {len(self.signatures)} signatures, expected 1 to {MAX_SEALS}")
        sizes = [
            ("payload", len(self.payload), MAX_PAYLOAD),
            ("payloadType", len(self.payloadType), MAX_TYPE),
            *((name, len(getattr(seal, name)), MAX_SEAL) for seal in self.signatures for name in ("sig", "keyid")),
        ]
        for name, size, most in sizes:
            if size > most:
                raise InvalidInput(f"the {name} of the envelope has {size:,} characters, expected at most {most:,}")
        _ = self.body, self.sigs()


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature that is kept. `actor` handed it in, and need not be who has the key."""

    key: PublicKey
    envelope: Envelope
    actor: str
    at: float


def pae(payload_type: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed, so that the type of a payload is signed with it."""
    kind = payload_type.encode("utf-8", "surrogatepass")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def statement(
    *, version: str, content: str, base: str, recipe: str | None, files: Sequence[FileRecord]
) -> dict[str, Any]:
    """What one who signs a version says: these files are that version, on that base, made by that recipe.

    Args:
        version: NAME:vN.
        content: the content digest, as `show` tells it.
        recipe: the recipe digest of a merge.
    """
    predicate = {"version": version, "content": content, "base": base}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.path, "digest": {"sha256": file.sha256}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate if recipe is None else {**predicate, "recipe": recipe},
    }


def difference(envelope: Envelope, expected: Mapping[str, Any]) -> str:
    """How what an envelope holds differs from `expected`, as the end of a sentence; empty where it does not."""
    from .header import strict_json_object  # deferred: help and gates read no payload

    if envelope.payloadType != PAYLOAD_TYPE:
        return f"it is of the type {envelope.payloadType[:80]!r}, not {PAYLOAD_TYPE}"
    try:
        said = strict_json_object(envelope.body, what="payload")
    except AdapterctlError as error:
        return error.message
    if said == expected:
        return ""
    for key in ("_type", "predicateType"):
        if said.get(key) != expected[key]:
            return f"its {key} is {_shown(said.get(key))}, not {expected[key]}"
    predicate, asked = said.get("predicate"), expected["predicate"]
    told = predicate if isinstance(predicate, dict) else {}
    for key in dict.fromkeys((*asked, *told)):
        if told.get(key) != asked.get(key):
            return f"it says {key} {_shown(told.get(key))}, not {_shown(asked.get(key))}"
    return "it is of other files, or of the same with other bytes"


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]


def _unbase64(text: str, what: str) -> bytes:
    """In either alphabet: DSSE wants both to be read."""
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"the {what} of the envelope is no base64: {text[:40]!r}") from error
