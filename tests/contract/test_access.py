"""Tokens and repeated requests, on every database that may keep them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from adapterctl.registry.domain.access import Caller, Scope, new_secret, secret_digest
from adapterctl.registry.domain.errors import Conflict, NotAllowed, NotFound, Refused
from adapterctl.registry.ports import Access, Replay
from adapterctl.registry.stores.sql.access import SqlAccess
from adapterctl.registry.stores.sql.engine import Database, sqlite_url


@pytest.fixture
def database(ledger: object, address: str, home: object) -> Iterator[Database]:
    database = Database(address if "://" in address else sqlite_url(home))
    yield database
    database.close()


@pytest.fixture
def access(database: Database) -> Access:
    return SqlAccess(database)


def add(access: Access, secret: str, **changes: object) -> str:
    values = {"name": "ci", "scope": Scope.MERGE, "names": ("chat*",), "created_by": "ada", "valid_s": None}
    return access.add_token(secret, **(values | changes)).id


def test_a_secret_leads_to_its_caller_and_is_kept_nowhere(access: Access, database: Database):
    secret = new_secret()
    token_id = add(access, secret)

    caller = access.caller(secret)

    assert caller == Caller("ci", Scope.MERGE, ("chat*",), token_id)
    with database.read() as connection:
        rows = [str(row) for row in connection.execute(text("SELECT * FROM token"))]
    assert secret not in "".join(rows)
    assert secret.removeprefix("actl_") not in "".join(rows)


def test_use_is_noted(access: Access):
    secret = new_secret()
    add(access, secret)
    assert access.tokens()[0].last_used_at is None

    access.caller(secret)

    (token,) = access.tokens()
    assert token.last_used_at >= token.created_at


@pytest.mark.parametrize("why", ["unknown", "revoked", "expired"])
def test_an_invalid_secret_leads_to_nobody(access: Access, why: str):
    secret = new_secret()
    token_id = add(access, secret, valid_s=-1.0 if why == "expired" else 60.0)
    if why == "revoked":
        assert access.revoke_token(token_id).revoked_at is not None

    assert access.caller(new_secret() if why == "unknown" else secret) is None
    assert access.has_tokens() == (why == "unknown")
    assert access.digests() == ({secret_digest(secret)} if why == "unknown" else set())


def test_revoking_what_is_not_there_is_said(access: Access):
    with pytest.raises(NotFound, match="nobody"):
        access.revoke_token("nobody")


def test_an_answer_is_given_again_to_the_same_request_of_the_same_caller(access: Access):
    answer = Replay(202, {"location": "/v1/jobs/1"}, "{}")
    assert access.begin_replay("ci", "k", "request") is None
    access.keep_replay("ci", "k", answer)

    assert access.begin_replay("ci", "k", "request") == answer
    assert access.begin_replay("other", "k", "request") is None
    with pytest.raises(Refused, match="another request"):
        access.begin_replay("ci", "k", "something else")


def test_a_request_that_is_being_answered_is_not_begun_twice(access: Access):
    access.begin_replay("ci", "k", "request")

    with pytest.raises(Conflict, match="not answered yet"):
        access.begin_replay("ci", "k", "request")

    access.drop_replay("ci", "k")
    assert access.begin_replay("ci", "k", "request") is None


@pytest.mark.parametrize(("age_s", "answered"), [(86_500, True), (400, False)], ids=["old answer", "dead server"])
def test_keys_are_free_again_after_a_day_or_when_their_server_died(
    access: Access, database: Database, age_s: int, answered: bool
):
    access.begin_replay("ci", "k", "request")
    if answered:
        access.keep_replay("ci", "k", Replay(200, {}, "old"))
    with database.write() as connection:
        connection.execute(text("UPDATE replay SET at = at - :age"), {"age": age_s})

    assert access.begin_replay("ci", "k", "request") is None


def test_a_caller_may_do_what_its_scope_covers_to_the_names_that_it_holds():
    caller = Caller("ci", Scope.PROMOTE, ("chat*", "team-?"))

    caller.check(Scope.MERGE)
    caller.check_change("chat-merged", "team-a")
    with pytest.raises(NotAllowed, match="scope promote, this needs admin"):
        caller.check(Scope.ADMIN)
    with pytest.raises(NotAllowed, match="not translate"):
        caller.check_change("chat", "translate")
    with pytest.raises(NotAllowed, match="concerns more"):
        caller.check_change()
    Caller("root", Scope.ADMIN).check_change()
