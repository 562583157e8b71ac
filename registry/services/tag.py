"""Tags of a version that is there: set and removed, each time as a row of its adapter's history.

The ledger is right at once, MLflow's tags of the version follow; the same words again set them right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..api import Tagged
from ..domain.errors import InvalidInput, Refused, Unavailable
from ..domain.version import AdapterVersion
from ..ports import Ledger, VersionStore
from .register import check_key, check_word
from .views import version_view


def tag(
    ledger: Ledger,
    versions: VersionStore,
    version: AdapterVersion,
    *,
    put: Mapping[str, str],
    remove: Sequence[str],
    actor: str,
    reason: str,
) -> Tagged:
    """Set the tags of `put` and take away those of `remove`; what stands already adds no row.

    Raises `InvalidInput` for keys and values that are not allowed, `Refused` for a version that was removed, and
    `Unavailable` where MLflow did not follow what was recorded.
    """
    _check(put, remove)
    if version.state != "live":
        raise Refused(f"{version.label} was removed", hint="choose another version")
    with ledger.exclusive(tags_lock(version.id)):  # of two at once, MLflow would else show what the first one says
        tagged = ledger.set_tags(version.id, put, remove, actor=actor, reason=reason)
        try:
            is_there = versions.project_tags(tagged, [*put, *remove])
        except Unavailable as error:
            hint = "run the same command again to write them to MLflow"
            raise error.though(f"the tags of {version.label} are recorded", hint=hint) from error
    lost = f"MLflow has no {version.label}: the tags are recorded, but not written there; `adapterctl doctor` tells why"
    return Tagged(version_view(ledger, tagged), () if is_there else (lost,))


def tags_lock(version_id: str) -> str:
    """What is held while a version's tags are written to MLflow."""
    return f"tags-{version_id}"


def _check(put: Mapping[str, str], remove: Sequence[str]) -> None:
    if not put and not remove:
        raise InvalidInput("there is no tag to set or to remove", hint="KEY=VALUE sets one, KEY- removes it")
    for key, value in put.items():
        check_word("tag", key, value)
    for key in remove:
        check_key("tag", key)
        if key in put:
            raise InvalidInput(f"the tag {key!r} is to be set and removed at once", hint="say one of them")
