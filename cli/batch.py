"""One adapter to register, as options or an entry of a batch file say it. Unknown keys are refused, not ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from ..registry.api import Registered, RegistryAPI
from ..registry.domain.errors import AdapterctlError, InvalidInput, Problem, raise_all
from ..registry.domain.refs import check_name, parse_ref, parse_source
from ..registry.services.read_yaml import parse_yaml, read_limited
from ..registry.services.register import check_folder

MAX_BATCH_BYTES = 1 << 24
HINT = "see `adapterctl register --help`"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of a batch file are the names of these fields, and `from`. Folders are relative to the file."""

    source: str
    name: str
    base: str | None = None
    kind: Literal["import", "train"] | None = None
    trained_from: str | None = msgspec.field(default=None, name="from")
    metrics: dict[str, float] = {}
    params: dict[str, str | int | float | bool] = {}
    tags: dict[str, str | int | float | bool] = {}
    dataset: str | None = None
    license: str | None = None
    suite: str | None = None
    assume_converted: bool = False

    def check(self) -> None:
        """Read every name and reference, and look for the folder. Raises before anything is registered."""
        source = parse_source(self.source)
        if source.kind == "folder":
            check_folder(Path(source.location).expanduser())
        check_name(self.name)
        if self.trained_from is not None:
            parse_ref(self.trained_from)

    def register(self, registry: RegistryAPI) -> Registered:
        parent = None if self.trained_from is None else parse_ref(self.trained_from)
        return registry.register(
            self.source,
            name=self.name,
            base=self.base,
            kind=self.kind or ("train" if parent else "import"),
            trained_from=parent,
            metrics=self.metrics,
            params={key: str(value) for key, value in self.params.items()},
            tags={key: str(value) for key, value in self.tags.items()},
            dataset=self.dataset,
            license=self.license,
            suite=self.suite,
            assume_converted=self.assume_converted,
        )


def read_batch(path: Path) -> list[Entry]:
    """The entries of a YAML (or JSON) list.

    Raises `NotFound` where there is no such file, `InvalidInput` with the problems of every entry.
    """
    items = parse_yaml(read_limited(path, MAX_BATCH_BYTES, hint=HINT), path, hint=HINT)
    if not isinstance(items, list) or not items:
        raise InvalidInput(
            f"{path} is not a list of adapters", hint="write '- source: ./adapter' and 'name: translate'"
        )
    entries, problems = [], []
    for position, item in enumerate(items, start=1):
        try:
            entry = _anchored(msgspec.convert(item, Entry), path.parent)
            entry.check()
            entries.append(entry)
        except (msgspec.ValidationError, AdapterctlError) as error:
            problems.append(Problem("entry", f"{position}: {error}", getattr(error, "hint", "")))
    raise_all(InvalidInput, f"{path} has entries that cannot be registered; nothing was", problems)
    return entries


def _anchored(entry: Entry, folder: Path) -> Entry:
    """The entry with its folder and its suite file relative to the batch file instead of the working folder."""
    changes: dict[str, Any] = {}
    if "://" not in entry.source and not entry.source.startswith(("runs:/", "models:/")):
        changes["source"] = str(folder / entry.source)
    if entry.suite is not None and (folder / entry.suite).is_file():
        changes["suite"] = str(folder / entry.suite)
    return msgspec.structs.replace(entry, **changes)
