"""What is signed of a version, and in which envelope: as DSSE, in-toto and RFC 8410 have it."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keys import new_key, public, seal

from adapterctl.registry.domain.digest import canonical_json
from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.signature import (
    MAX_PAYLOAD,
    MAX_SEALS,
    PAYLOAD_TYPE,
    Envelope,
    PublicKey,
    Seal,
    difference,
    pae,
    read_public_key,
    statement,
)
from adapterctl.registry.domain.version import FileRecord
from adapterctl.registry.services.signatures import fault

FILES = (FileRecord("adapter_config.json", 2, "a" * 64), FileRecord("adapter_model.safetensors", 3, "b" * 64))
SAID = statement(version="translate:v3", content="c" * 64, base="tiny", recipe="d" * 64, files=FILES)
# RFC 8410, section 10.1
RFC_KEY = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="


def test_what_is_signed_is_encoded_as_the_example_of_dsse():
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_the_statement_names_the_files_and_says_which_version_they_are():
    assert canonical_json(SAID).decode() == (
        '{"_type":"https://in-toto.io/Statement/v1","predicate":{"base":"tiny","content":"' + "c" * 64 + '","recipe":"'
        + "d" * 64 + '","version":"translate:v3"},"predicateType":"urn:adapterctl:version:v1","subject":['
        '{"digest":{"sha256":"' + "a" * 64 + '"},"name":"adapter_config.json"},'
        '{"digest":{"sha256":"' + "b" * 64 + '"},"name":"adapter_model.safetensors"}]}'
    )  # fmt: skip
    alone = statement(version="translate:v3", content="c" * 64, base="tiny", recipe=None, files=FILES)
    assert "recipe" not in alone["predicate"]


@pytest.mark.parametrize(
    "text",
    [
        RFC_KEY,
        f"  {RFC_KEY}\n",
        f"-----BEGIN PUBLIC KEY-----\n{RFC_KEY}\n-----END PUBLIC KEY-----\n",
        f"-----BEGIN PUBLIC KEY-----\r\n{RFC_KEY[:40]}\r\n{RFC_KEY[40:]}\r\n-----END PUBLIC KEY-----",
    ],
)
def test_a_public_key_is_read_from_pem_and_from_what_stands_between_its_lines(text: str):
    key = read_public_key(text)

    assert str(key) == RFC_KEY
    assert key.raw.hex() == "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
    assert key.id == hashlib.sha256(base64.b64decode(RFC_KEY)).hexdigest()


def test_what_is_no_public_ed25519_key_is_refused_and_no_secret_is_told_again():
    other = generate_private_key(SECP256R1()).public_key()
    private = new_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    (line,) = private.splitlines()[1:-1]
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    long = base64.b64encode(base64.b64decode(RFC_KEY) + b"x").decode()

    for text in (pem, private, line, "", "é", "ssh-ed25519 AAAA", RFC_KEY[:-2], long, f"-----BEGIN {RFC_KEY}"):
        with pytest.raises(InvalidInput, match="expected a public Ed25519 key in PEM or base64") as refused:
            read_public_key(text)
        assert line[20:] not in refused.value.message
    with pytest.raises(InvalidInput) as refused:
        read_public_key(base64.b64encode(bytes(range(32))).decode())  # a bare seed
    assert refused.value.message.startswith("is 'AAECAwQFBgcI', expected")
    whole = base64.b64encode(bytes.fromhex("3051020101300506032b657004220420") + bytes(67)).decode()
    for text in (private, line, whole):
        with pytest.raises(InvalidInput, match="is a private key"):
            read_public_key(text)


# by the neutral point B = 0 and S = 0 everything is signed; the others are of order 2, 4 and 8, or other encodings
NEUTRAL = (1).to_bytes(32, "little")
ORDER_8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
ANYONES = [
    NEUTRAL.hex(),
    "01" + "00" * 30 + "80",
    "00" * 32,
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "ff",
    ORDER_8,
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]


@pytest.mark.parametrize("raw", ANYONES)
def test_a_key_by_which_anyone_can_sign_is_none(raw: str):
    key = PublicKey(base64.b64decode(RFC_KEY)[:12] + bytes.fromhex(raw))
    sig = Seal(base64.b64encode(NEUTRAL + bytes(32)).decode())

    forged = [
        not fault(key, Envelope(base64.b64encode(body).decode(), PAYLOAD_TYPE, (sig,)), SAID)
        for body in (canonical_json(SAID) + b" " * more for more in range(256))
    ]

    assert any(forged)  # nobody had a private key
    with pytest.raises(InvalidInput, match="is a key by which anyone can sign"):
        read_public_key(str(key))


GOOD = Envelope("e30=", "t", (Seal("c2ln"),))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"payload": "A" * (MAX_PAYLOAD + 4)}, "the payload of the envelope has 65,540 characters, expected at most"),
        ({"payload": "not base64!"}, "the payload of the envelope is no base64: 'not base64!'"),
        ({"payload": "e30"}, "no base64"),
        ({"payload": "é"}, "no base64"),
        ({"payloadType": "t" * 257}, "the payloadType of the envelope has 257 characters"),
        ({"signatures": ()}, f"the envelope has 0 signatures, expected 1 to {MAX_SEALS}"),
        ({"signatures": (Seal("c2ln"),) * 17}, "the envelope has 17 signatures"),
        ({"signatures": (Seal("A" * 260),)}, "the sig of the envelope has 260 characters"),
        ({"signatures": (Seal("c2ln", "k" * 257),)}, "the keyid of the envelope has 257 characters"),
        ({"signatures": (Seal("c2ln"), Seal("*"))}, "the sig of the envelope is no base64"),
    ],
)
def test_an_envelope_that_is_too_large_or_no_base64_is_refused(changes: dict[str, Any], told: str):
    GOOD.check()

    with pytest.raises(InvalidInput) as refused:
        replace(GOOD, **changes).check()

    assert told in refused.value.message


def test_both_alphabets_of_base64_are_read():
    assert Envelope("-_8=", "t", ()).body == Envelope("+/8=", "t", ()).body == b"\xfb\xff"


def changed(**fields: Any) -> dict[str, Any]:
    return {**SAID, "predicate": {**SAID["predicate"], **fields}}


OTHERS = {
    "": (SAID, ""),
    "name": (changed(version="chat:v3"), "it says version 'chat:v3', not 'translate:v3'"),
    "base": (changed(base="other"), "it says base 'other', not 'tiny'"),
    "recipe": (changed(recipe=None), "it says recipe nothing, not"),
    "more": (changed(approved="by ada"), "it says approved 'by ada', not nothing"),
    "files": ({**SAID, "subject": SAID["subject"][:1]}, "it is of other files, or of the same with other bytes"),
    "bytes": (
        {**SAID, "subject": [{"name": "adapter_config.json", "digest": {"sha256": "e" * 64}}, SAID["subject"][1]]},
        "it is of other files, or of the same with other bytes",
    ),
    "kind": ({**SAID, "predicateType": "https://slsa.dev/provenance/v1"}, "its predicateType is 'https://slsa.dev/"),
    "no predicate": ({**SAID, "predicate": 7}, "it says version nothing, not 'translate:v3'"),
    "twice": (canonical_json(SAID)[:-1] + b',"_type":"x"}', "the payload"),
    "a list": (b"[]", "the payload is a JSON list, not an object"),
    "no JSON": (b"\xff", "the payload is not JSON"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_else_was_signed_is_told(what: str):
    said, told = OTHERS[what]

    found = difference(seal(said, new_key()), SAID)

    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_another_type_of_payload_is_another_thing():
    assert difference(seal(SAID, new_key(), payload_type="application/json"), SAID) == (
        "it is of the type 'application/json', not application/vnd.in-toto+json"
    )


def test_the_id_of_a_key_is_that_of_its_der():
    key = new_key()

    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    assert public(key).id == hashlib.sha256(der).hexdigest()
