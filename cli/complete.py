"""Names, versions and stages for the shell's completion, read straight from the ledger file or asked of the server.

Completion runs at every press of a key: it opens the database read-only with the standard library, or sends one request
that is not waited for long, and is silent whatever goes wrong. A ledger on PostgreSQL is not asked.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import typer

from ..registry.domain.errors import AdapterctlError

if TYPE_CHECKING:
    from ..registry.settings import Settings

_LIMIT = 200
#: What a press of a key may wait for a server.
_PATIENCE_S = 0.5
_ENDS = frozenset(":@=")


def complete_names(ctx: typer.Context, incomplete: str) -> list[str]:
    return _silent(lambda: _names(_settings(ctx), incomplete))


def complete_refs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names first; behind a colon or an @ the versions and the stages of that adapter."""
    return _silent(lambda: _refs(_settings(ctx), incomplete))


def complete_stages(ctx: typer.Context, incomplete: str) -> list[str]:
    return _silent(lambda: [stage for stage in _settings(ctx).stages if stage.startswith(incomplete)])


def complete_jobs(ctx: typer.Context, incomplete: str) -> list[str]:
    return _silent(lambda: _jobs(_settings(ctx), incomplete))


@contextmanager
def whole_words() -> Iterator[None]:
    """Undo that bash ends a word at ':', '@' and '=', around the program's answer to bash.

    The script that typer installs hands over the pieces, one a line; bash puts an answer behind the last end.
    """
    words, place, cut = glue(os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"]))
    os.environ |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(place)}
    answers = io.StringIO()
    try:
        with redirect_stdout(answers):
            yield
    finally:
        sys.stdout.writelines(f"{line[cut:]}\n" for line in answers.getvalue().splitlines())


def glue(pieces: Sequence[str], current: int) -> tuple[list[str], int, int]:
    """Whole words up to piece `current`, the place of the last one, and how much of it stands before that piece."""
    words: list[str] = []
    cut = 0
    joining = False
    for piece in pieces[: current + 1]:
        is_end = bool(piece) and _ENDS.issuperset(piece)
        cut = 0
        if words and (is_end or joining):
            words[-1] += piece
            cut = len(words[-1]) if is_end else len(words[-1]) - len(piece)
        else:
            words.append(piece)
        joining = is_end
    return words, len(words) - 1, cut


def _settings(ctx: typer.Context) -> Settings:
    from ..registry.settings import load_settings  # deferred: commands other than completion load it when they run

    home = ctx.params.get("home") or (ctx.parent.params.get("home") if ctx.parent else None)
    return load_settings({"home": home})


def _names(settings: Settings, start: str) -> list[str]:
    if settings.server:
        return [name for name in _ask(settings, "adapters", "name") if name.startswith(start)]
    return _query(settings, "SELECT name FROM adapter WHERE name LIKE ? ESCAPE '\\' ORDER BY name", _prefix(start))


def _refs(settings: Settings, start: str) -> list[str]:
    name, mark = next(((start.partition(m)[0], m) for m in ":@" if m in start), (start, ""))
    if mark == ":" and settings.server:
        found = _ask(settings, "versions", "ref", name=name)
        return [ref for ref in reversed(found) if ref.startswith(start)]
    if mark == ":":
        query = (
            "SELECT a.name || ':v' || v.number FROM version v JOIN adapter a ON a.id = v.adapter_id"
            " WHERE a.name = ? AND v.state = 'live' AND 'v' || v.number LIKE ? ESCAPE '\\' ORDER BY v.number DESC"
        )
        return [ref for ref in _query(settings, query, name, _prefix(start[len(name) + 1 :])) if ref.startswith(start)]
    if mark == "@":
        return [ref for ref in (f"{name}@{stage}" for stage in settings.stages) if ref.startswith(start)]
    return _names(settings, start)


def _jobs(settings: Settings, start: str) -> list[str]:
    if settings.server:
        return [job for job in _ask(settings, "jobs", "id") if job.startswith(start)]
    return _query(settings, "SELECT id FROM job WHERE id LIKE ? ESCAPE '\\' ORDER BY id DESC", _prefix(start))


def _ask(settings: Settings, what: str, field: str, **query: str) -> list[str]:
    """One field of each item of the first page of a list."""
    import json  # deferred: see above
    from urllib.parse import urlencode

    from ..registry.rest.transport import Http

    target = f"/v1/{what}?{urlencode({**query, 'max_results': _LIMIT})}"
    headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
    with closing(Http(str(settings.server)).send("GET", target, headers, None, _PATIENCE_S)) as answer:
        return [item[field] for item in json.loads(answer.read())[what]] if answer.status == 200 else []


def _query(settings: Settings, query: str, *arguments: str) -> list[str]:
    import sqlite3  # deferred: see above

    from ..registry.settings import LEDGER_DATABASE

    if settings.database_url:
        return []
    address = f"{(settings.home / LEDGER_DATABASE).as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=0.2)) as ledger:
        return [row[0] for row in ledger.execute(f"{query} LIMIT {_LIMIT}", arguments)]


def _prefix(start: str) -> str:
    return start.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"


def _silent(complete: Callable[[], list[str]]) -> list[str]:
    import http.client  # deferred: see above
    import sqlite3

    try:
        return complete()
    except (AdapterctlError, sqlite3.Error, OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return []
