"""A metric along a lineage, and what lies between two versions, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapterctl.cli import lineage_text
from adapterctl.cli.output import Output
from adapterctl.registry.api import MetricPoint, ParentView
from adapterctl.registry.domain.errors import NotFound
from adapterctl.registry.services.trace import along


@pytest.fixture
def family(views):
    view = views(["omni:v1", "chat:v1", "code:v1"], [("chat:v1", "omni:v1"), ("code:v1", "omni:v1")])
    omni, chat, code = view.versions
    parents = tuple(ParentView(each.ref, 0.5, "merge") for each in (chat, code))
    omni = replace(omni, metrics={"bleu": 0.3}, parents=parents)
    return replace(view, versions=(omni, replace(chat, metrics={"bleu": 0.4}), code), found=("chat:v1", "omni:v1"))


def test_a_metric_along_a_lineage_stands_beside_that_of_the_parents(family):
    points = along(family, "bleu")

    assert points == (
        MetricPoint("omni:v1", "bleu", 0.3, {"chat:v1": 0.4}),
        MetricPoint("chat:v1", "bleu", 0.4, {}),
        MetricPoint("code:v1", "bleu", None, {}),
    )
    table = lineage_text.metric_table(points, Output(color=False)).splitlines()
    assert [line.split() for line in table] == [
        ["VERSION", "BLEU", "PARENTS"],
        ["omni:v1", "0.3", "chat:v1", "0.4"],
        ["chat:v1", "0.4", "-"],
        ["code:v1", "-", "-"],
    ]
    with pytest.raises(NotFound, match="chrf") as caught:
        along(family, "chrf")
    assert caught.value.hint == "bleu"


def test_what_lies_between_two_versions_is_named_first_and_drawn(family):
    text = lineage_text.between(family, "a shortest path", Output(color=False))

    assert text.splitlines()[0] == "a shortest path: chat:v1, omni:v1"
    assert text.splitlines()[2].startswith("chat:v1")
    assert "omni:v1" in text.partition("\n\n")[2]
    assert lineage_text.between(replace(family, found=()), "both are made of", Output()) == "both are made of: nothing"
