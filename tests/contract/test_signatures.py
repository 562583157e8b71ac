"""Signatures of versions, on every ledger: which are kept, which count, and which attacks on them are seen."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from keys import new_key, public, seal
from sqlalchemy import text

from adapterctl.registry.domain.errors import Corrupt, InvalidInput, Refused
from adapterctl.registry.domain.gate import check_gates
from adapterctl.registry.domain.signature import MAX_SIGNATURES, Envelope, Seal
from adapterctl.registry.domain.verdict import Judged, Signed, decide
from adapterctl.registry.domain.version import AdapterVersion, Base
from adapterctl.registry.ports import Ledger
from adapterctl.registry.services.gates import check_gate, collect, decide_on, set_gates
from adapterctl.registry.services.promote import history
from adapterctl.registry.services.sign import sign
from adapterctl.registry.services.signatures import OTHER, statement_of
from adapterctl.registry.services.views import version_view
from adapterctl.registry.wire import to_json

AddVersion = Callable[..., AdapterVersion]
ADA, EVE, BOT = new_key(), new_key(), new_key()


def keep(ledger: Ledger, version: AdapterVersion, key: Any = ADA, envelope: Envelope | None = None) -> Any:
    sealed = envelope or seal(statement_of(version), key)
    return sign(ledger, version, sealed, str(public(key)), actor="ci")


def gate(*keys: Any, at_least: int = 1) -> dict[str, Any]:
    named = {name: str(public(key)) for name, key in zip(("ada", "bot"), keys, strict=False)}
    return {"gates": [{"stage": "production", "signatures": {"at_least": at_least, "keys": named}}]}


def judged(ledger: Ledger, version: AdapterVersion, *keys: Any, at_least: int = 1) -> Judged:
    (only,) = check_gates(gate(*keys, at_least=at_least))
    (found,) = decide(only.conditions, collect(ledger, version, "production", only.conditions)).conditions
    return found


def test_a_signature_is_kept_once_with_who_handed_it_in_and_a_row_of_the_history(
    ledger: Ledger, add_version: AddVersion
):
    version = add_version()

    kept = keep(ledger, version)
    again = keep(ledger, version, envelope=seal(json.dumps(statement_of(version)).encode(), ADA))

    assert (kept.keyid, kept.key, kept.by, kept.fault) == (public(ADA).id, str(public(ADA)), "ci", "")
    assert again == kept
    assert version_view(ledger, version).signatures == (kept,)
    (row,) = ledger.stage_history(version.adapter_id)
    assert (row.action, row.version_id, row.actor, row.stage) == ("sign", version.id, "ci", "")
    assert row.reason == f"by the key {public(ADA).id}"
    assert history(ledger, version.name, verify=True).findings == ()


def test_a_gate_counts_the_keys_that_it_names_and_the_evidence_says_which(ledger: Ledger, add_version: AddVersion):
    version = add_version()

    none = judged(ledger, version, ADA, BOT, at_least=2)
    keep(ledger, version, EVE)
    keep(ledger, version, ADA)
    one = judged(ledger, version, ADA, BOT, at_least=2)
    keep(ledger, version, BOT)
    both = judged(ledger, version, ADA, BOT, at_least=2)
    set_gates(ledger, gate(ADA, BOT, at_least=2), stages=("production",), actor="root")
    decision = decide_on(ledger, version, "production")

    said = "the number of signatures is {}, the gate asks for at least 2: {}"
    assert (none.verdict, none.found, none.distance) == ("failed", "nobody", -2)
    assert none.reason == said.format(0, "ada did not sign; bot did not sign")
    assert (one.verdict, one.found, one.reason) == ("failed", "ada", said.format(1, "bot did not sign"))
    assert (both.verdict, both.found, both.reason) == ("passed", "ada, bot", "")
    assert decision.verdict.passed
    assert decision.evidence.signatures == (Signed(public(ADA).id, ""), Signed(public(BOT).id, ""))


def test_one_of_several_keys_is_enough_where_no_more_are_asked_for(ledger: Ledger, add_version: AddVersion):
    version = add_version()
    keep(ledger, version, BOT)

    found = judged(ledger, version, ADA, BOT)

    assert (found.condition, found.verdict, found.found) == ("signatures: 1 of ada, bot", "passed", "bot")


def test_what_does_not_hold_is_not_kept(ledger: Ledger, add_version: AddVersion):
    version, twin = add_version(content_digest="c" * 64), add_version("chat", content_digest="c" * 64)
    good = seal(statement_of(version), ADA)
    sig = bytearray(base64.b64decode(good.signatures[0].sig))
    sig[0] ^= 1
    flipped = (Seal(base64.b64encode(sig).decode(), public(ADA).id),)
    said = base64.b64encode(b" " + good.body).decode()
    bad = {
        "another key, the keyid of ours": (replace(seal(statement_of(version), EVE), signatures=good.signatures), None),
        "by another key": (seal(statement_of(version), EVE), OTHER),
        "a changed signature": (replace(good, signatures=flipped), OTHER),
        "a changed payload": (replace(good, payload=said), OTHER),
        "a changed type": (replace(good, payloadType="application/json"), OTHER),
        "a short signature": (replace(good, signatures=(Seal("c2ln"),)), OTHER),
        "the same bytes under another name": (seal(statement_of(twin), ADA), "it says version 'chat:v1'"),
        "a plain signature of the payload": (
            replace(good, signatures=(Seal(base64.b64encode(ADA.sign(good.body)).decode()),)),
            OTHER,
        ),
    }
    assert bad.pop("another key, the keyid of ours")[0] == good  # a keyid and a signature are all that differs

    for what, (envelope, told) in bad.items():
        with pytest.raises(
            Refused, match=f"that is no signature of translate:v1 by the key {public(ADA).id[:16]}"
        ) as no:
            keep(ledger, version, ADA, envelope)
        assert str(told) in no.value.message, what
    for envelope in (replace(good, payload="*"), replace(good, signatures=())):
        with pytest.raises(InvalidInput):
            keep(ledger, version, ADA, envelope)
    with pytest.raises(InvalidInput, match="expected a public Ed25519 key"):
        sign(ledger, version, good, "garbage", actor="ci")

    assert ledger.signatures(version.id) == []
    assert ledger.stage_history(version.adapter_id) == []


def test_one_good_signature_of_an_envelope_is_enough(ledger: Ledger, add_version: AddVersion):
    version = add_version()
    good, other = (seal(statement_of(version), key) for key in (ADA, EVE))
    both = replace(good, signatures=other.signatures + good.signatures)

    assert keep(ledger, version, ADA, both).fault == ""
    assert keep(ledger, version, EVE, both).fault == ""
    assert judged(ledger, version, ADA, BOT).found == "ada"


def test_a_signature_counts_no_more_where_the_record_says_something_else_since(ledger: Ledger, add_version: AddVersion):
    renamed, moved = add_version(), add_version("chat")
    other = ledger.add_base(Base("base-2", "other"), ["other"])
    for version in (renamed, moved):
        keep(ledger, version)

    ledger.rename_adapter(renamed.adapter_id, "traduce", actor="ada")
    ledger.merge_bases(other.id, moved.spec.base.id)

    renamed, moved = (ledger.version(each.id) for each in (renamed, moved))
    assert judged(ledger, renamed, ADA).reason.endswith(
        "what ada signed does not count, for it says version 'translate:v1', not 'traduce:v1'"
    )
    assert version_view(ledger, moved).signatures[0].fault == "it says base 'base-1', not 'base-2'"
    keep(ledger, moved)  # and is made anew
    assert judged(ledger, moved, ADA).verdict == "passed"
    assert [bool(each.fault) for each in version_view(ledger, moved).signatures] == [True, False]


def test_what_becomes_of_a_version_takes_no_signature_away(ledger: Ledger, add_version: AddVersion):
    version = add_version()
    kept = keep(ledger, version)

    ledger.recall(version.id, "recall", actor="ada", reason="leaked")
    set_gates(ledger, gate(ADA), stages=("production",), actor="root")
    checked = check_gate(ledger, version, "production")
    ledger.remove_version(version.id, actor="ada", reason="leaked")

    assert [each.verdict for each in checked.conditions] == ["failed", "passed"]
    assert version_view(ledger, ledger.version(version.id)).signatures == (kept,)
    with pytest.raises(Refused, match="translate:v1 was removed"):
        keep(ledger, version, EVE)


def test_a_version_has_only_so_many_signatures(ledger: Ledger, add_version: AddVersion):
    version = add_version()
    for _ in range(MAX_SIGNATURES):
        key = new_key()
        ledger.add_signature(version.id, public(key), seal(statement_of(version), key), actor="ci")

    with pytest.raises(Refused, match=f"has {MAX_SIGNATURES} signatures"):
        keep(ledger, version)


def test_a_key_that_a_gate_asks_for_finds_a_place_where_others_took_all(ledger: Ledger, add_version: AddVersion):
    version = add_version()
    for _ in range(MAX_SIGNATURES):
        keep(ledger, version, new_key())
    elsewhere, here = gate(ADA), gate(ADA)
    elsewhere["gates"][0]["adapters"] = ["chat-*"]

    set_gates(ledger, elsewhere, stages=("production",), actor="root")
    with pytest.raises(Refused, match=f"has {MAX_SIGNATURES} signatures"):
        keep(ledger, version)
    set_gates(ledger, here, stages=("production",), actor="root")
    kept = keep(ledger, version)

    assert decide_on(ledger, version, "production").verdict.passed
    assert keep(ledger, version) == kept  # and takes one place
    assert len(ledger.signatures(version.id)) == MAX_SIGNATURES + 1
    with pytest.raises(Refused, match=f"has {MAX_SIGNATURES + 1} signatures"):
        keep(ledger, version, EVE)


@pytest.fixture
def unguarded(ledger: Ledger) -> Callable[..., None]:
    """Run statements as one who owns the database and takes the triggers away."""

    def run(statement: str, **values: Any) -> None:
        with ledger._db.write() as connection:
            if connection.dialect.name == "sqlite":
                connection.execute(text("DROP TRIGGER IF EXISTS signature_no_update"))
                connection.execute(text("DROP TRIGGER IF EXISTS signature_no_delete"))
            else:
                connection.execute(text("ALTER TABLE signature DISABLE TRIGGER ALL"))
            connection.execute(text(statement), values)

    return run


def test_an_envelope_or_a_key_that_is_changed_in_the_database_counts_no_more(
    ledger: Ledger, add_version: AddVersion, unguarded: Callable[..., None]
):
    version, other = add_version(), add_version("chat")
    keep(ledger, version)
    keep(ledger, other)

    unguarded("UPDATE signature SET version_id = :to WHERE version_id = :of", to=version.id, of=other.id)
    assert judged(ledger, version, ADA).verdict == "passed"  # its own is there still
    unguarded("DELETE FROM signature WHERE id = (SELECT min(id) FROM signature)")
    moved = judged(ledger, version, ADA)
    unguarded("UPDATE signature SET key = :key", key=str(public(EVE)))
    swapped = judged(ledger, version, EVE)
    unguarded("UPDATE signature SET key = 'garbage'")
    with pytest.raises(Corrupt, match="the key of a stored signature is 'garbage', expected"):
        judged(ledger, version, EVE)
    unguarded("UPDATE signature SET key = :key, envelope = '{}'", key=str(public(EVE)))
    with pytest.raises(Corrupt, match="stored Envelope cannot be read"):
        judged(ledger, version, EVE)
    unguarded("UPDATE signature SET envelope = :good", good=to_json(seal(statement_of(version), EVE)))

    assert "for it says version 'chat:v1'" in moved.reason
    assert OTHER in swapped.reason
    assert history(ledger, "translate", verify=True).findings == ("a signature by the key of row 1 is gone",)


def test_a_signature_that_is_gone_is_missed_though_its_key_signed_twice(
    ledger: Ledger, add_version: AddVersion, unguarded: Callable[..., None]
):
    version = add_version()
    keep(ledger, version)
    ledger.rename_adapter(version.adapter_id, "traduce", actor="ada")
    keep(ledger, ledger.version(version.id))
    before = history(ledger, "traduce", verify=True).findings

    unguarded("DELETE FROM signature WHERE id = (SELECT max(id) FROM signature)")

    assert before == ()
    assert history(ledger, "traduce", verify=True).findings == ("a signature by the key of row 3 is gone",)
