"""Chromium for tests of what a page does; where it is absent they are skipped and say how to get it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Open = Callable[..., Any]

#: What axe-core checks: the guidelines up to WCAG 2.2 AA, and what it calls good practice.
_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Of one module: as long as Playwright is there, its event loop runs, and no other test could run one."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("NO CHROMIUM: pages are not tested here; `apt-get install chromium` brings it")
    from playwright.sync_api import sync_playwright  # deferred: nobody else needs it

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a text as a file. After the test: no error on the console, no dialog, and nothing was asked of anyone."""
    told: list[str] = []
    contexts = []

    def open_it(text: str, suffix: str = "html", *, fragment: str = "", scheme: str = "light") -> Any:
        path = tmp_path / f"lineage.{suffix}"
        path.write_text(text, encoding="ascii")
        context = chromium.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 820})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (told.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: told.append(f"request: {request.url}") if not _own(request, path) else None)
        page.on("popup", lambda popup: told.append(f"popup: {popup.url}"))
        page.goto(path.as_uri() + fragment)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert told == []


def _own(request: Any, path: Path) -> bool:
    return str(request.url).partition("#")[0] == path.as_uri()


@pytest.fixture(scope="session")
def barriers() -> Callable[[Any], list[str]]:
    """What keeps people from a page: the violations that axe-core finds in it, and pale text in its drawing."""
    from axe_playwright_python.sync_playwright import Axe  # deferred: nobody else needs it

    axe, drawing = Axe(), Path(__file__).with_name("accessible.js").read_text()
    options = {"runOnly": {"type": "tag", "values": list(_RULES)}, "resultTypes": ["violations"]}

    def find(page: Any) -> list[str]:
        result = axe.run(page, options=options)
        return [*([result.generate_report()] if result.violations_count else []), *page.evaluate(drawing)]

    return find
