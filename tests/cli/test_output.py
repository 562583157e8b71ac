"""What goes where: data on stdout, talk on stderr, one exit code an outcome, nothing raw from a registry."""

from __future__ import annotations

import inspect
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapterctl.cli.output import EXIT_CODES, Output, as_json, as_yaml, cell_width, color_wanted, columns, printable
from adapterctl.registry.api import Check
from adapterctl.registry.domain import errors

DOCUMENTED = {
    "failure": 1, "conflict": 1, "corrupt": 1, "unavailable": 1, "too_many_requests": 1, "invalid_input": 2,
    "misconfigured": 2,
    "not_found": 3, "not_allowed": 4, "refused": 5, "invalid_adapter": 5, "incompatible_parents": 5,
    "loss_too_high": 5, "recalled": 5, "stage_moved": 5, "decision_outdated": 5, "has_descendants": 5,
    "job_failed": 6, "job_cancelled": 7,
    "receipt_failed": 5,
    "gate_refused": 5, "wait_timed_out": 8,
}  # fmt: skip


def all_errors() -> list[type[errors.AdapterctlError]]:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    return [c for c in classes if issubclass(c, errors.AdapterctlError)]


def test_every_error_has_its_exit_code():
    assert {kind.code: EXIT_CODES[kind] for kind in all_errors()} == DOCUMENTED


def test_an_error_says_what_happened_every_problem_and_what_to_do_next(capsys):
    problems = [errors.Problem("rank", "ranks differ", "use svd"), errors.Problem("base", "bases differ")]
    error = errors.IncompatibleParents("these cannot be merged", hint="pick others", problems=problems)

    code = Output().fail(error)

    printed = capsys.readouterr()
    assert code == 5
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "error: these cannot be merged",
        "  rank: ranks differ (use svd)",
        "  base: bases differ",
        "hint: pick others",
    ]


def test_problems_that_the_message_lists_are_not_said_twice(capsys):
    problems = [errors.Problem("rank", "ranks differ")]

    with pytest.raises(errors.IncompatibleParents) as caught:
        errors.raise_all(errors.IncompatibleParents, "no merge:", problems)
    Output().fail(caught.value)

    assert capsys.readouterr().err.count("ranks differ") == 1


def test_with_json_an_error_is_an_object_on_stderr(capsys):
    error = errors.NotFound("there is no x", hint="ls", problems=[errors.Problem("c", "m", "h")])

    code = Output("json").fail(error)

    printed = capsys.readouterr()
    assert printed.out == ""
    assert json.loads(printed.err) == {
        "error": {
            "code": "not_found", "message": "there is no x", "hint": "ls",
            "problems": [{"code": "c", "message": "m", "hint": "h"}],
        },
        "exit_code": code,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("format", "expected"), [("json", "[]\n"), ("yaml", "[]\n"), ("name", ""), ("table", "none\n")]
)
def test_an_empty_list_is_an_answer(format: str, expected: str, capsys):
    Output(format).data([], text=lambda: "none", names=[])

    assert capsys.readouterr().out == expected


def test_talk_goes_to_stderr_and_is_silent_for_names(capsys):
    Output("table").say("hello")
    Output("name").say("hello")

    assert capsys.readouterr() == ("", "hello\n")


def test_columns_are_aligned_by_what_a_terminal_shows():
    lines = columns([["NAME", "N"], ["日本", "1"], ["a", "10"]], right={1})

    assert lines == ["NAME   N", "日本   1", "a     10"]
    assert {cell_width(line) for line in lines} == {8}


@given(st.text())
def test_no_text_can_move_the_cursor_or_turn_the_line(text: str):
    shown = printable(text)

    assert shown.isprintable() or all(c == " " or not c.isspace() for c in shown if not c.isprintable())
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2066\u200b\ufeff" for c in shown)


@given(st.text())
def test_json_and_yaml_escape_and_give_back_any_text(text: str):
    check = Check("name", "ok", text)

    rendered, document = as_json(check), as_yaml(check)

    assert json.loads(rendered)["detail"] == text
    assert yaml.safe_load(document)["detail"] == text
    for shown in (rendered, document):
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c == "\u202e" for c in shown)


def test_no_colour_where_nobody_sees_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not color_wanted(False)
    monkeypatch.setenv("NO_COLOR", "")
    assert color_wanted(False)
    assert not color_wanted(True)
    assert Output(color=True).paint("text", "red") == "text"
