"""Tokens, and answers that may be asked for again, as rows beside the ledger: what only a served registry needs."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import uuid6
from sqlalchemy import Row, delete, insert, or_, select, update

from ... import wire
from ...domain.access import Caller, Scope, Token, secret_digest
from ...domain.errors import Conflict, NotFound, Refused
from ...ports import Replay
from .engine import Database, Now, insert_once
from .tables import replay, token

KEPT_S = 24 * 3600.0
#: A request that began longer ago died with its server.
ABANDONED_S = 300.0
#: `last_used_at` is a hint for people, not worth a write a request.
_SEEN_S = 60.0


class SqlAccess:
    """`registry.ports.Access` on the ledger's database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # tokens

    def add_token(
        self, secret: str, *, name: str, scope: Scope, names: Sequence[str], created_by: str, valid_s: float | None
    ) -> Token:
        row = {
            "id": str(uuid6.uuid7()),
            "name": name,
            "secret_sha256": secret_digest(secret),
            "scope": scope.value,
            "names": wire.to_json(list(names)),
            "created_at": Now(),
            "created_by": created_by,
            "expires_at": None if valid_s is None else Now() + valid_s,
        }
        with self._db.write() as connection:
            return _token(connection.execute(insert(token).values(row).returning(token)).one())

    def tokens(self) -> list[Token]:
        with self._db.read() as connection:
            return [_token(row) for row in connection.execute(select(token).order_by(token.c.created_at, token.c.id))]

    def has_tokens(self) -> bool:
        with self._db.read() as connection:
            return connection.execute(select(token.c.id).where(_VALID).limit(1)).first() is not None

    def revoke_token(self, token_id: str) -> Token:
        with self._db.write() as connection:
            first = update(token).where(token.c.id == token_id, token.c.revoked_at.is_(None)).values(revoked_at=Now())
            connection.execute(first)
            row = connection.execute(select(token).where(token.c.id == token_id)).one_or_none()
        if row is None:
            raise NotFound(f"there is no token {token_id}", hint="adapterctl tokens ls")
        return _token(row)

    def caller(self, secret: str) -> Caller | None:
        digest = secret_digest(secret)
        with self._db.read() as connection:
            row = connection.execute(select(token).where(token.c.secret_sha256 == digest, _VALID)).one_or_none()
        if row is None or not hmac.compare_digest(row.secret_sha256, digest):
            return None
        self._note_use(row)
        return Caller(row.name, Scope(row.scope), tuple(wire.from_json(row.names, list[str])), row.id)

    def digests(self) -> frozenset[str]:
        with self._db.read() as connection:
            return frozenset(connection.execute(select(token.c.secret_sha256).where(_VALID)).scalars())

    def _note_use(self, row: Row[Any]) -> None:
        stale = or_(token.c.last_used_at.is_(None), token.c.last_used_at < Now() - _SEEN_S)
        mine = token.c.id == row.id
        with self._db.read() as connection:
            if connection.execute(select(token.c.id).where(mine, stale)).first() is None:
                return
        with self._db.write() as connection:
            connection.execute(update(token).where(mine, stale).values(last_used_at=Now()))

    # answers that may be asked for again

    def begin_replay(self, caller: str, key: str, request: str) -> Replay | None:
        mine = (replay.c.caller == caller) & (replay.c.key == key)
        new = insert(replay).values(caller=caller, key=key, request=request, at=Now())
        with self._db.write() as connection:
            connection.execute(delete(replay).where(replay.c.at < Now() - KEPT_S))
            if insert_once(connection, new):
                return None
            row = connection.execute(select(replay).where(mine).with_for_update()).one_or_none()
            if row is None:  # its first request failed just now
                raise Conflict("the first request with this Idempotency-Key has just failed", hint="try again")
            if row.request != request:
                raise Refused(
                    "this Idempotency-Key was used with another request", hint="take a new key for a new request"
                )
            if row.status is not None:
                return Replay(row.status, wire.from_json(row.headers, dict[str, str]), row.body)
            dead = replay.c.at < Now() - ABANDONED_S
            taken = connection.execute(update(replay).where(mine, dead).values(at=Now()).returning(replay.c.key))
            if taken.one_or_none() is None:
                raise Conflict(
                    "the first request with this Idempotency-Key is not answered yet", hint="wait, then try again"
                )
            return None

    def keep_replay(self, caller: str, key: str, answer: Replay) -> None:
        values: Mapping[str, Any] = {
            "status": answer.status,
            "headers": wire.to_json(answer.headers),
            "body": answer.body,
        }
        with self._db.write() as connection:
            mine = (replay.c.caller == caller) & (replay.c.key == key)
            connection.execute(update(replay).where(mine).values(values))

    def drop_replay(self, caller: str, key: str) -> None:
        with self._db.write() as connection:
            connection.execute(delete(replay).where(replay.c.caller == caller, replay.c.key == key))


_VALID = token.c.revoked_at.is_(None) & or_(token.c.expires_at.is_(None), token.c.expires_at > Now())


def _token(row: Row[Any]) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        scope=Scope(row.scope),
        names=tuple(wire.from_json(row.names, list[str])),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
