"""Clear away what MLflow has twice, by what the ledger names.

Registration holds a lock, so one process at a time makes a version. But a lock can be lost without its holder's doing
(PostgreSQL drops the connection, somebody deletes the file), and a process that is inside MLflow then makes what it
asked for although another one has made it, too. The ledger takes one of the two and refuses the other. Whoever has made
anything looks here when it is through, and so does whoever was taken: the later of the two sees what the other left.
Only a loser that is killed in between leaves its double, which `doctor` names and `gc` frees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..domain.errors import AdapterctlError
from ..domain.version import AdapterVersion
from ..ports import Ledger, VersionStore

_log = logging.getLogger("adapterctl")


def clear_doubles(ledger: Ledger, versions: VersionStore, key: str, named: Callable[[], AdapterVersion | None]) -> None:
    """Delete what was made under `key` beside the version that the ledger names now; nothing where it names none.

    Needs no lock: what was not taken never will be, for the ledger has one live version of an identity. What cannot be
    deleted now is no failure of the registration.
    """
    try:
        version = named()
        if version is None or not versions.doubles([version], key):
            return
        # seldom, so that all may be read: somebody may have given this key to the run of another version
        for double in versions.doubles(ledger.versions(include_removed=True), key):
            versions.drop_double(double)
            _log.warning("deleted %s: it was made beside %s, which the ledger names", double.label, double.of.label)
    except AdapterctlError as error:
        _log.warning("MLflow may hold something twice: %s; see `adapterctl doctor`", error.message)
