"""Read an evaluation suite from its YAML file, or back from what the ledger keeps of it.

The file is untrusted: YAML's safe loader, no key twice, data only from the suite's own folder, sizes limited.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..domain.errors import InvalidInput, NotFound
from ..domain.suite import Suite, check_suite
from ..domain.version import AdapterVersion
from ..ports import Ledger
from ..wire import from_json, to_json

MAX_SUITE_BYTES = 1 << 20
MAX_DATA_BYTES = 16 << 20


def load_suite(path: Path) -> Suite:
    """Read and check the suite at `path`, with its data.

    Raises `NotFound` when there is no such file, `InvalidInput` with every problem of the suite and its rows.
    """
    folder = path.parent.resolve()
    value = _parse(_read(path, MAX_SUITE_BYTES), path)

    def read(name: str) -> bytes:
        data = (folder / name).resolve()
        if not data.is_relative_to(folder):  # a symbolic link that leads out
            raise InvalidInput(f"{name} leads out of the suite's folder")
        return _read(data, MAX_DATA_BYTES, shown=name)

    return check_suite(value, read)


def add_suite(ledger: Ledger, adapter_id: str, suite: Suite) -> None:
    """Let `suite` judge the adapter and everything merged from it; one of the same name is replaced.

    The content is kept, not the path: a file that changes later changes nothing here.
    """
    others = [row for row in ledger.suites(adapter_id) if row[0] != suite.name]
    ledger.set_suites(adapter_id, [*others, (suite.name, suite.digest, to_json(suite))])


def suites_of(ledger: Ledger, version: AdapterVersion) -> list[Suite]:
    """The suites that judge a version: its adapter's own, or else those of the versions it was merged from."""
    own = ledger.suites(version.adapter_id)
    if own:
        return [from_json(body, Suite) for _, _, body in own]
    edges = ledger.parent_edges([version.id]).get(version.id, ())
    parents = ledger.versions_by_id([edge.parent_id for edge in edges])
    found = [suite for edge in edges for suite in suites_of(ledger, parents[edge.parent_id])]
    return list({suite.digest: suite for suite in found}.values())


def keep_suite(ledger: Ledger, suite: Suite) -> str:
    """Store the suite under its digest, where a job finds it whatever became of its file; returns the digest."""
    ledger.keep_suite(suite.digest, suite.name, to_json(suite))
    return suite.digest


def find_suite(ledger: Ledger, text: str) -> Suite:
    """The suite that `text` names: the digest of a kept one, or the path of a YAML file."""
    kept = ledger.kept_suite(text) if re.fullmatch("[0-9a-f]{64}", text) else None
    return load_suite(Path(text)) if kept is None else from_json(kept, Suite)


def _read(path: Path, limit: int, *, shown: str = "") -> bytes:
    shown = shown or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no file {shown}", hint="see docs/evaluation.md for how a suite is written") from error
    except OSError as error:
        raise InvalidInput(f"{shown} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise InvalidInput(f"{shown} is larger than {limit >> 20} MiB")
    return content


def _parse(content: bytes, path: Path) -> Any:
    import yaml  # deferred: `ls` and `show` read no YAML

    class UniqueKeys(yaml.SafeLoader):
        """YAML itself lets the last of two equal keys win in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is used twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        # a subclass of the safe loader: it builds texts, numbers, lists and mappings only
        return UniqueKeys(content.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InvalidInput(f"{path} is not plain YAML: {error}", hint="see docs/evaluation.md") from error
