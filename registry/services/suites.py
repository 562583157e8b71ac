"""Read an evaluation suite from its YAML file, or back from what the ledger keeps of it.

The file is untrusted: YAML's safe loader, no key twice, data only from the suite's own folder, sizes limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..domain.errors import InvalidInput, NotFound
from ..domain.suite import Suite, check_suite
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


def set_suites(ledger: Ledger, adapter_id: str, suites: Sequence[Suite]) -> None:
    """Make these the suites that judge the adapter and everything merged from it. The content is kept, not a path."""
    ledger.set_suites(adapter_id, [(suite.name, suite.digest, to_json(suite)) for suite in suites])


def own_suites(ledger: Ledger, adapter_id: str) -> list[Suite]:
    return [from_json(body, Suite) for _, _, body in ledger.suites(adapter_id)]


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
