"""Lineage for browsers: pages at `/adapters/NAME` and `/adapters/NAME/VERSION`, a picture below each, and their list.

MLflow's own pages show the pictures inside descriptions and lead to the pages, which lead back. Each is asked for again
at every visit and answered with 304 while it is the same: a description is written once, and what it shows is fresh.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ..api import AdapterView, Direction, Drawing, Look
from ..domain.errors import AdapterctlError
from ..domain.refs import Ref, check_name
from .routes import Call, Read, version_ref

router = APIRouter(prefix="/adapters", include_in_schema=False)
#: Adapters on one page of their list.
LISTED = 500
#: A form sends what nobody chose as an empty text.
Depth = Annotated[str, Query(pattern="^[0-9]{0,5}$")]
Metric = Annotated[str, Query(max_length=300)]
_CODE = re.compile("`([^`]+)`")
_STYLE = (
    ":root{color-scheme:light dark}body{max-width:40em;margin:4em auto;padding:0 1em;"
    'font:16px/1.5 ui-sans-serif,system-ui,"DejaVu Sans",sans-serif}h1{font-size:1.3em}'
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


@router.api_route("", methods=["GET", "HEAD"])
@router.api_route("/", methods=["GET", "HEAD"])
def list_page(request: Request, call: Read, after: Annotated[str, Query(max_length=512)] = "") -> Response:
    """The adapters, each with its newest version and what serves its stages; a page of them, `after` a name."""
    folder = "" if request.url.path.endswith("/") else "adapters/"
    found = call.registry.adapters(after=after or None, limit=LISTED + 1)
    items = "\n".join(_item(folder, each) for each in found[:LISTED])
    none = "There are no more." if after else "None is registered yet."
    body = f"<ul>\n{items}\n</ul>" if items else f"<p>{none}</p>"
    if len(found) > LISTED:
        body += f'\n<p><a href="?after={quote(found[LISTED - 1].name, safe="")}">More</a></p>'
    return _plain("Adapters", body, 200)


@router.api_route("/{name}/lineage.svg", methods=["GET", "HEAD"])
def family_picture(request: Request, name: str, call: Read, metric: Metric = "") -> Response:
    """The newest versions of an adapter with their parents and children."""
    return _fresh(request, call.registry.picture(Ref(check_name(name)), _look(metric=metric), whole=True))


@router.api_route("/{name}/{version}/lineage.svg", methods=["GET", "HEAD"])
def version_picture(
    request: Request,
    name: str,
    version: str,
    call: Read,
    direction: Direction = "both",
    depth: Depth = "",
    metric: Metric = "",
) -> Response:
    """A version and its nearest relatives."""
    return _fresh(request, call.registry.picture(version_ref(name, version), _look(direction, depth, metric)))


@router.api_route("/{name}", methods=["GET", "HEAD"])
def family_page(request: Request, name: str, call: Read, metric: Metric = "") -> Response:
    """All versions of an adapter with their parents and children."""
    return _page(request, call, Ref(check_name(name)), _look(metric=metric), whole=True)


@router.api_route("/{name}/{version}", methods=["GET", "HEAD"])
def version_page(
    request: Request,
    name: str,
    version: str,
    call: Read,
    direction: Direction = "both",
    depth: Depth = "",
    metric: Metric = "",
) -> Response:
    """All relatives of a version."""
    return _page(request, call, version_ref(name, version), _look(direction, depth, metric), whole=False)


def wants_a_page(request: Request) -> bool:
    """Whether a browser asks for one of these pages: then an error is told in a page too, not as a problem."""
    return f"{request.url.path}/".startswith(f"{router.prefix}/") and "text/html" in request.headers.get("accept", "")


def problem_page(error: AdapterctlError, status: int) -> Response:
    """What is wrong with an address that somebody followed or wrote."""
    title = error.code.replace("_", " ").capitalize()
    lines = [error.abroad, *(problem.message for problem in error.problems), error.hint]
    told = "\n".join(_CODE.sub(r"<code>\1</code>", f"<p>{html.escape(line)}</p>") for line in lines if line)
    return _plain(title, told, status)


def _plain(title: str, body: str, status: int) -> Response:
    """A page of text alone; both are HTML."""
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>"
    )
    allowed = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"
    return Response(text, status, {"content-security-policy": allowed}, "text/html; charset=utf-8")


def _item(folder: str, adapter: AdapterView) -> str:
    serves = "".join(f", {stage} {version}" for stage, version in sorted(adapter.stages.items()))
    name = html.escape(adapter.name)
    return f'<li><a href="{folder}{name}">{name}</a>: {html.escape(f"{adapter.latest}{serves}")}</li>'


def _look(direction: Direction = "both", depth: str = "", metric: str = "") -> Look:
    return Look(direction=direction, depth=int(depth or 0) or None, metric=metric or None)


def _page(request: Request, call: Call, ref: Ref, look: Look, *, whole: bool) -> Response:
    # relative, so that a proxy may put us below a path of its own
    root = "../" * (request.url.path.count("/") - 1)
    return _fresh(request, call.registry.page(ref, look, whole=whole, root=root))


def _fresh(request: Request, drawing: Drawing) -> Response:
    body = drawing.text.encode("ascii")
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "etag": tag,
        "cache-control": "private, no-cache",
        "content-security-policy": f"{drawing.policy}; frame-ancestors 'none'",
        "referrer-policy": "same-origin",
    }
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=drawing.media_type, headers=headers)
