"""What an adapter that comes as files was made of, as far as this registry can tell; and whether a recall hits that.

Two things tell it. A version here that has the same bytes is a fact: its copy has its parents. Without one, the header
of a merged file holds our recipe, and the recipe names the parents by their content: a claim, which makes gates ask for
more and recalls reach further, never less. Such parents are edges of the kind `imported`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..domain.adapter import AdapterFacts
from ..domain.digest import is_digest
from ..domain.errors import Corrupt, InvalidAdapter, Recalled
from ..domain.header import strict_json_object
from ..domain.recipe import Recipe
from ..domain.version import AdapterVersion
from ..ports import Ledger, Parent
from ..wire import from_builtins
from .recall import check_not_recalled
from .views import recall_views


@dataclass(frozen=True, slots=True)
class Origins:
    """Parents that are live here, in order, and how that is known; both empty where nothing tells."""

    parents: tuple[Parent, ...] = ()
    told_by: str = ""


def recipe_in(facts: AdapterFacts) -> Recipe | None:
    """The recipe in the header. Raises `InvalidAdapter` for one that is none, or has another digest than is said."""
    text = facts.metadata.get("adapterctl.recipe")
    if text is None:
        return None
    try:
        recipe = from_builtins(strict_json_object(text.encode(), what="adapterctl.recipe"), Recipe)
    except Corrupt as error:
        raise InvalidAdapter(f"the recipe in the header cannot be read: {error.message}") from error
    if not recipe.parents or not all(is_digest(parent.digest) for parent in recipe.parents):
        raise InvalidAdapter("the recipe in the header names parents by what is no content digest")
    if recipe.digest != facts.metadata.get("adapterctl.recipe_digest"):
        raise InvalidAdapter(
            f"the recipe in the header has the digest {recipe.digest[:12]}, which is not the one that stands beside it",
            hint="the header was changed after the merge; get the file from where it was made",
        )
    return recipe


def check_bytes(ledger: Ledger, content_digest: str, recipe: Recipe | None) -> None:
    """Raise `Recalled` where a recall hits these very bytes, under whatever name, or those that they were merged of.

    Removed versions count: what they held is no better for it.
    """
    check_not_recalled(ledger, _holders(ledger, content_digest), "register other bytes")
    parents = [each for parent in _parents(recipe) for each in _holders(ledger, parent)]
    recalls = recall_views(ledger) if parents else {}
    for parent in parents:
        if (hit := recalls.get(parent.id)) is not None:
            raise Recalled.of("this file, by its header,", hit.ref, hit.reason, "merge other versions")


def origins(ledger: Ledger, content_digest: str, recipe: Recipe | None) -> Origins:
    """The parents of what has these bytes: those of the first version here that has them, else those of the recipe."""
    for twin in _holders(ledger, content_digest):
        edges = ledger.parent_edges([twin.id]).get(twin.id, ())
        known = ledger.versions_by_id([edge.parent_id for edge in edges])
        parents = [Parent(known[edge.parent_id], edge.weight, "imported") for edge in edges]
        if parents and all(parent.version.state == "live" for parent in parents):
            return Origins(tuple(parents), f"it has the bytes of {twin.label}")
    found = []
    for parent in recipe.parents if recipe is not None else ():
        holder = next(iter(ledger.versions_by_digest(parent.digest)), None)
        if holder is not None:
            found.append(Parent(holder, parent.weight, "imported"))
    return Origins(tuple(found), "its header says so") if found else Origins()


def _parents(recipe: Recipe | None) -> Sequence[str]:
    return [parent.digest for parent in recipe.parents] if recipe is not None else []


def _holders(ledger: Ledger, content_digest: str) -> list[AdapterVersion]:
    return ledger.versions_by_digest(content_digest, include_removed=True)
