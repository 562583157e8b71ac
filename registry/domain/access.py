"""Who may do what over REST: tokens, their scopes, and the names that they may change.

A token is 256 random bits, shown once; only its SHA-256 is kept, so a copy of the ledger opens nothing. Scopes are
steps: who may promote may also merge and read. Pure: no clock, no database.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from .errors import InvalidInput, NotAllowed
from .refs import is_like

TOKEN_PREFIX = "actl_"
EVERY_NAME = ("*",)
MAX_GLOBS = 32
MAX_VALID_S = 10 * 366 * 86400.0

_SECRET = re.compile(r"[\x21-\x7e]{1,2000}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.@+-]{0,127}")
_GLOB = re.compile(r"[a-z0-9._*?-]{1,128}")


class Scope(StrEnum):
    """In this order; each includes those before it."""

    READ = "read"
    MERGE = "merge"
    PROMOTE = "promote"
    FORCE = "force"
    ADMIN = "admin"

    def covers(self, other: Scope) -> bool:
        return _ORDER.index(self) >= _ORDER.index(other)


_ORDER = tuple(Scope)


@dataclass(frozen=True, slots=True)
class Token:
    """A key as it is listed; the secret is not in it. Times are seconds since the epoch by the ledger's clock.

    `names` are globs of the adapters that it may change; reading is not limited by them.
    """

    id: str
    name: str
    scope: Scope
    names: tuple[str, ...]
    created_at: float
    created_by: str
    expires_at: float | None = None
    last_used_at: float | None = None
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who stands behind a request. `name` is recorded with every change."""

    name: str
    scope: Scope
    names: tuple[str, ...] = EVERY_NAME
    token_id: str = ""

    def check(self, needed: Scope) -> None:
        """Raise `NotAllowed` where the scope does not reach."""
        if not self.scope.covers(needed):
            raise NotAllowed(
                f"{self.name} has the scope {self.scope}, this needs {needed}",
                hint="ask an admin for a token: adapterctl tokens create",
            )

    def check_change(self, *adapters: str) -> None:
        """Raise `NotAllowed` unless every adapter is one that the token may change; no adapter stands for all."""
        if EVERY_NAME[0] in self.names:
            return
        refused = [name for name in adapters if not is_like(name, self.names)]
        if refused or not adapters:
            raise NotAllowed(
                f"{self.name} may change {', '.join(self.names)} only"
                + (f", not {', '.join(refused)}" if refused else ", and this concerns more"),
                hint="ask an admin for a token with other names",
            )


def new_secret() -> str:
    """What the caller keeps and sends; it cannot be shown again."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def secret_digest(secret: str) -> str:
    """What the ledger keeps of it. 256 random bits need no slow hash: nobody can try them out."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_secret(secret: str) -> str:
    """Return the secret; raise `InvalidInput`, without it, for what cannot be sent as one."""
    if not _SECRET.fullmatch(secret):
        raise InvalidInput("the token holds characters that none has", hint="copy it again: actl_ and what follows")
    return secret


def check_token(name: str, names: Sequence[str], valid_s: float | None) -> None:
    """Raise `InvalidInput` for what a token cannot be."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"token name {name[:80]!r} is not allowed", hint="use letters, digits and ' _ . @ + -'")
    if not 1 <= len(names) <= MAX_GLOBS or not all(_GLOB.fullmatch(glob) for glob in names):
        raise InvalidInput(
            f"{', '.join(names)[:200]!r} are not globs of adapter names", hint="for example 'translate' or 'chat-*'"
        )
    if valid_s is not None and not 0 < valid_s <= MAX_VALID_S:
        raise InvalidInput(f"a token cannot be valid for {valid_s:g} s", hint="at most ten years, or for good")


def parse_scope(text: str) -> Scope:
    try:
        return Scope(text)
    except ValueError as error:
        raise InvalidInput(f"scope {text!r} is unknown", hint=f"known: {', '.join(Scope)}") from error
