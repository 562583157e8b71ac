"""Takes the pictures of README.md and docs/ from a real run: the demo in a terminal, MLflow's pages on what it made.

    .venv/bin/python docs/pictures.py        needs Debian's `chromium` and the packages of requirements-dev.lock

The demo runs in a home of its own, so the pictures show what a reader gets from `make demo`.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
ADAPTERCTL = [sys.executable, "-m", "adapterctl"]
PORT = 5077
COLUMNS = 104
EVALUATION, SEARCH = "eval translate-chat:v1 on translate", "tune translate-chat"
#: Runs by name, and the pictures among their artifacts.
FIGURES = {EVALUATION: ["retention.png"], SEARCH: ["pareto.png", "weights.png"]}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    os.environ.update(HOME=tempfile.mkdtemp(prefix="pictures-"), ADAPTERCTL_ACTOR="you")
    story = in_terminal([*ADAPTERCTL, "demo"]).replace(os.environ["HOME"], "/home/you")
    home = Path.home() / ".adapterctl-demo"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900}, device_scale_factor=1)
        take_terminal(page, story)
        take_figures(home)
        with serving(home):
            take_lineage(page)
            take_pages(page, home)
            take_recall(page, home)
        browser.close()


def take_figures(home: Path) -> None:
    """What evaluation and search draw themselves, as MLflow holds it."""
    words = ["tune", "translate:v3", "chat:v5", "--limit", "32", "--budget", "14"]
    subprocess.run([*ADAPTERCTL, "--home", str(home), *words], check=True, stdout=subprocess.DEVNULL)
    for name, files in FIGURES.items():
        for file in files:
            drawn = home / "artifacts" / run_named(home, name) / "artifacts" / file
            (PICTURES / f"{name.partition(' ')[0]}-{file}").write_bytes(drawn.read_bytes())


def run_named(home: Path, name: str) -> str:
    """The id of the run of that name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    return client.search_runs(["1"], f"attributes.run_name = '{name}'", max_results=1)[0].info.run_id


def in_terminal(command: list[str]) -> str:
    """What the command writes to a colour terminal of COLUMNS columns."""
    written = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        written.extend(data)
        return data

    os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm-256color", LINES="60")
    os.environ.pop("NO_COLOR", None)
    # progress bars go to stderr, and a picture does not move
    quiet = ["sh", "-c", 'exec "$@" 2>/dev/null', "sh", *command]
    if os.waitstatus_to_exitcode(pty.spawn(quiet, read)):
        raise SystemExit(f"{' '.join(command)} failed")
    return written.decode().replace("\r\n", "\n")


def take_terminal(page: Page, text: str) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(text), soft_wrap=True)
    html = console.export_html(inline_styles=True)
    style = "body{background:#fff;margin:18px 22px;font-size:13.5px}pre{font-family:'DejaVu Sans Mono'!important}"
    page.set_viewport_size({"width": 980, "height": 400})
    page.set_content(f"{html}<style>{style}</style>")
    page.screenshot(path=PICTURES / "demo.png", full_page=True)


def take_lineage(page: Page) -> None:
    """Our own pages: a version with what is known of it, and a metric along a lineage, in the dark."""
    address = f"http://127.0.0.1:{PORT}/adapters"
    page.set_viewport_size({"width": 1360, "height": 760})
    page.goto(f"{address}/translate/v3")
    page.focus("[data-ref='translate-chat:v1']")
    page.get_by_text("The whole receipt").wait_for()
    page.screenshot(path=PICTURES / "lineage.png")
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/translate-chat/v1?metric=translate%2Fnll")
    page.screenshot(path=PICTURES / "lineage-metric.png")
    page.emulate_media(color_scheme="light")


def take_recall(page: Page, home: Path) -> None:
    """What a recall reaches, with the stage that serves it."""
    words = ["recall", "chat:v4", "--reason", "trained on leaked data"]
    subprocess.run([*ADAPTERCTL, "--home", str(home), *words], check=True, stdout=subprocess.DEVNULL)
    page.set_viewport_size({"width": 1360, "height": 760})
    page.goto(f"http://127.0.0.1:{PORT}/adapters/translate-chat/v1")
    page.screenshot(path=PICTURES / "lineage-recall.png")


def take_pages(page: Page, home: Path) -> None:
    page.set_viewport_size({"width": 1360, "height": 800})
    address = f"http://127.0.0.1:{PORT}"
    for name, path in shown(home).items():
        page.goto("about:blank")  # a change behind the '#' alone would keep the page that was there
        page.goto(address + path)
        page.wait_for_timeout(6000)  # its pages poll, so the network is never idle
        for _ in range(3):  # MLflow greets every new browser with dialogs
            page.keyboard.press("Escape")
            page.wait_for_timeout(300)
        assistant = page.get_by_role("button", name="Close").first
        if assistant.count():
            assistant.click()
        if name == "mlflow-run":
            page.get_by_text("Logged models").last.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        # where the files lie on this machine is of no interest to a reader
        page.get_by_text("Path:").evaluate_all("found => found.forEach(each => each.style.visibility = 'hidden')")
        page.screenshot(path=PICTURES / f"{name}.png")


def shown(home: Path) -> dict[str, str]:
    """The pages worth a picture, by file name."""
    from adapterctl.bootstrap import connect
    from adapterctl.registry.domain.refs import Ref
    from adapterctl.registry.settings import load_settings

    registry = connect(load_settings({"home": home}), readonly=True)
    lossy = registry.version(Ref("translate-chat", number=2))
    child, parent = registry.version(Ref("translate-chat", number=1)), registry.version(Ref("translate", number=3))
    return {
        "mlflow-models": "/#/models",
        "mlflow-version": child.mlflow_path,
        "mlflow-run": f"/#/experiments/1/runs/{child.run_id}",
        "mlflow-layers": f"/#/experiments/1/runs/{lossy.run_id}/artifacts/layers.svg",
        "mlflow-retention": f"/#/experiments/1/runs/{run_named(home, EVALUATION)}/artifacts/retention.png",
        "mlflow-search": f"/#/experiments/1/runs/{run_named(home, SEARCH)}/artifacts/trials.png",
        "mlflow-parent": f"/#/experiments/1/models/{parent.model_id}",
    }


@contextmanager
def serving(home: Path) -> Iterator[None]:
    command = [*ADAPTERCTL, "--home", str(home), "serve", "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            while not _answers(f"http://127.0.0.1:{PORT}/health"):
                if time.monotonic() > deadline:
                    raise SystemExit("the server did not start")
                time.sleep(0.5)
            yield
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
