"""Read an evaluation suite from its YAML file, or back from what the ledger keeps of it.

The file is untrusted: plain YAML, data only from the suite's own folder, sizes limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..api import SuiteView
from ..domain.digest import is_digest
from ..domain.errors import InvalidInput, NotFound
from ..domain.prompts import PromptForm, prompt_form
from ..domain.suite import Suite, check_suite
from ..domain.version import AdapterVersion
from ..ports import Ledger
from ..wire import from_json, to_json
from .read_yaml import parse_yaml, read_limited

MAX_SUITE_BYTES = 1 << 20
MAX_DATA_BYTES = 16 << 20
#: Forms of prompts that a process keeps at hand, by the digests of the suites that show them.
FORMS_KEPT = 256
HINT = "docs/evaluation.md shows how a suite is written"

_forms: dict[tuple[str, ...], PromptForm | None] = {}


def load_suite(path: Path) -> Suite:
    """Read and check the suite at `path`, with its data.

    Raises `NotFound` when there is no such file, `InvalidInput` with every problem of the suite and its rows.
    """
    folder = path.parent.resolve()
    value = parse_yaml(read_limited(path, MAX_SUITE_BYTES, hint=HINT), path, hint=HINT)

    def read(name: str) -> bytes:
        data = (folder / name).resolve()
        if not data.is_relative_to(folder):  # a symbolic link that leads out
            raise InvalidInput(f"{name} leads out of the suite's folder")
        return read_limited(data, MAX_DATA_BYTES, shown=name, hint=HINT)

    return check_suite(value, read)


def add_suite(ledger: Ledger, adapter_id: str, suite: Suite) -> None:
    """Let `suite` judge the adapter and everything merged from it; one of the same name is replaced.

    The content is kept, not the path: a file that changes later changes nothing here.
    """
    keep_suite(ledger, suite)
    others = [row for row in ledger.suites(adapter_id) if row[0] != suite.name]
    ledger.set_suites(adapter_id, [*others, (suite.name, suite.digest, to_json(suite))])


def suites_of(ledger: Ledger, version: AdapterVersion) -> list[Suite]:
    """The suites that judge a version: its adapter's own, or else those of the versions it was merged from."""
    return [_kept(ledger, digest) for digest in judging(ledger, [version])[version.id]]


def judging(ledger: Ledger, versions: Sequence[AdapterVersion]) -> dict[str, tuple[str, ...]]:
    """The digests of the suites that judge each version, by its id; a few reads for all of them together."""
    own = ledger.suite_digests([version.adapter_id for version in versions])
    found = {version.id: own.get(version.adapter_id, ()) for version in versions}
    edges = ledger.parent_edges([version_id for version_id, digests in found.items() if not digests])
    if edges:
        parent_ids = dict.fromkeys(edge.parent_id for each in edges.values() for edge in each)
        above = judging(ledger, list(ledger.versions_by_id(list(parent_ids)).values()))
        for version_id, each in edges.items():
            found[version_id] = tuple(dict.fromkeys(digest for edge in each for digest in above[edge.parent_id]))
    return found


def forms_of(ledger: Ledger, versions: Sequence[AdapterVersion]) -> list[PromptForm | None]:
    """How each version is spoken to: as its tag declares, or as the prompts of its suites show."""
    digests = judging(ledger, versions)
    return [prompt_form(each.spec.tags, ()) or _seen_form(ledger, digests[each.id]) for each in versions]


def _seen_form(ledger: Ledger, digests: tuple[str, ...]) -> PromptForm | None:
    if digests not in _forms:
        # a digest means the same suite for good, and to read one takes longer than all else that a merge asks
        if len(_forms) >= FORMS_KEPT:
            _forms.clear()
        _forms[digests] = prompt_form({}, [_kept(ledger, digest) for digest in digests])
    return _forms[digests]


def _kept(ledger: Ledger, digest: str) -> Suite:
    body = ledger.kept_suite(digest)
    assert body is not None
    return from_json(body, Suite)


def keep_suite(ledger: Ledger, suite: Suite) -> str:
    """Store the suite under its digest, where a job finds it whatever became of its file; returns the digest."""
    ledger.keep_suite(suite.digest, suite.name, to_json(suite))
    return suite.digest


def suite_views(ledger: Ledger) -> list[SuiteView]:
    """Every kept suite, by name, with the adapters that it judges."""
    judged: dict[tuple[str, str], list[str]] = {row: [] for row in ledger.kept_suites()}
    for name, digest, adapter in ledger.judging_suites():
        judged.setdefault((name, digest), []).append(adapter)
    return [SuiteView(name, digest, tuple(adapters)) for (name, digest), adapters in sorted(judged.items())]


def named_suite(ledger: Ledger, text: str) -> Suite:
    """The kept suite of this name, digest, or beginning of a digest. Raises `NotFound`; of a name the judging one."""
    views = suite_views(ledger)
    found = [view for view in views if view.name == text] or [view for view in views if view.digest.startswith(text)]
    found = [view for view in found if view.adapters] or found
    if len(found) != 1:
        shown = ", ".join(f"{view.name} {view.digest[:12]}" for view in found or views)
        raise NotFound(
            f"{text!r} means {len(found)} suites" if found else f"no suite {text!r} is kept here",
            hint=f"kept are: {shown or 'none'}",
        )
    return _kept(ledger, found[0].digest)


def find_suite(ledger: Ledger, text: str) -> Suite:
    """The suite that `text` names: the digest of a kept one, or the path of a YAML file."""
    kept = ledger.kept_suite(text) if is_digest(text) else None
    return load_suite(Path(text)) if kept is None else from_json(kept, Suite)
