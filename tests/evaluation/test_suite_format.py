"""A suite is data: what is allowed in it, what is refused, and what its digest depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterctl.registry.domain.errors import InvalidInput, NotFound
from adapterctl.registry.domain.suite import Row
from adapterctl.registry.services.suites import load_suite
from adapterctl.registry.wire import from_json, to_json

TASK = "tasks:\n  - {name: t, data: rows.jsonl, metrics: [nll, chrf]}\n"


def test_a_suite_holds_every_text_that_a_model_will_see(write_suite: Callable[..., Path]):
    path = write_suite('tasks:\n  - {name: t, data: rows.jsonl, prompt: "Q: {{ prompt }}", target: "{{target}}."}\n')

    (task,) = load_suite(path).tasks

    assert task.rows[0] == Row("a", "Q: un chat ->", " a cat.")
    assert (task.metrics, task.primary, task.limit, task.generates) == (("nll",), "nll", 100, False)


def test_generated_metrics_raise_the_default_limit(write_suite: Callable[..., Path]):
    (task,) = load_suite(write_suite(TASK)).tasks

    assert (task.generates, task.limit) == (True, 400)


def test_a_suite_survives_the_ledger(write_suite: Callable[..., Path]):
    suite = load_suite(write_suite(TASK))

    again = from_json(to_json(suite), type(suite))

    assert again == suite
    assert again.digest == suite.digest


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tasks: []\n", "holds 0 tasks"),
        ("tasks: 5\n", "tasks: is a whole number, expected a list"),
        (TASK + "nope: 1\n", "nope: is no key of a suite"),
        (TASK + "tasks: []\n", "key 'tasks' is used twice"),
        (TASK.replace("name: t", "name: T!"), "tasks[0].name: 'T!' is not allowed"),
        (TASK.replace("nll, ", "bleu, "), "names 'bleu', known are nll, nll_per_byte, chrf, exact_match"),
        (TASK.replace("nll, ", "chrf, "), "names a metric twice"),
        (TASK.replace("}", ", primary: exact_match}"), "which is not among the metrics"),
        (TASK.replace("}", ", limit: yes}"), "tasks[0].limit: is a bool, expected a whole number"),
        (TASK.replace("}", ", max_new_tokens: 100000}"), "expected 1 to 1024"),
        (TASK.replace("}", ", stop: ['']}"), "none of them empty"),
        (TASK.replace("}", ', prompt: "{% for x in y %}"}'), "templates know {{ field }} and nothing else"),
        (TASK.replace("}", ', prompt: "{{ prompt | upper }}"}'), "templates know {{ field }} and nothing else"),
        (TASK.replace("}", ', prompt: "{{ question }}"}'), "lacks the field 'question'"),
        (TASK.replace("rows.jsonl", "../rows.jsonl"), "expected a .jsonl file inside the suite's folder"),
        (TASK.replace("rows.jsonl", "/etc/rows.jsonl"), "expected a .jsonl file inside the suite's folder"),
        (TASK.replace("rows.jsonl", "other.jsonl"), "there is no file other.jsonl"),
        (TASK + "  - {name: t, data: rows.jsonl}\n", "task name 't' is used twice"),
        ("tasks: !!python/object/apply:os.system ['true']\n", "is not plain YAML"),
        ("tasks: !function utils.evil\n", "is not plain YAML"),
        ("tasks: [\n", "is not plain YAML"),
        ("[" * 20_000, "is not plain YAML"),
    ],
)
def test_what_is_no_suite_is_refused_by_name(write_suite: Callable[..., Path], text: str, complaint: str):
    path = write_suite(text)

    with pytest.raises(InvalidInput) as refusal:
        load_suite(path)

    assert complaint in refusal.value.message


def test_all_problems_are_told_at_once(write_suite: Callable[..., Path]):
    path = write_suite(
        "extra: 1\ntasks:\n  - {name: t, data: rows.jsonl, metrics: [bleu], seed: -1, until: x}\n  - 7\n"
    )

    with pytest.raises(InvalidInput) as refusal:
        load_suite(path)

    assert [problem.code for problem in refusal.value.problems] == [
        "extra",
        "tasks[0].until",
        "tasks[0].metrics",
        "tasks[0].seed",
        "tasks[1]",
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "x", "target": " "}, "line 2 has an empty prompt or target"),
        ({"id": "a", "prompt": "x", "target": "y"}, "uses an id twice"),
        ({"prompt": "x", "target": 3}, "line 2 is not an object of texts"),
    ],
)
def test_bad_rows_are_told_by_line(write_suite: Callable[..., Path], row: dict[str, str], complaint: str):
    path = write_suite(TASK, rows=[{"id": "a", "prompt": "p", "target": "t"}, row])

    with pytest.raises(InvalidInput) as refusal:
        load_suite(path)

    assert complaint in refusal.value.message


def test_data_outside_the_folder_is_not_reached_by_a_link(write_suite: Callable[..., Path], tmp_path: Path):
    path = write_suite(TASK)
    secret = tmp_path.parent / f"{tmp_path.name}-secret.jsonl"
    secret.write_text('{"prompt": "p", "target": "t"}\n')
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl").symlink_to(secret)

    with pytest.raises(InvalidInput) as refusal:
        load_suite(path)

    assert "leads out of the suite's folder" in refusal.value.message


def test_a_missing_suite_is_not_found(tmp_path: Path):
    with pytest.raises(NotFound):
        load_suite(tmp_path / "nowhere.yaml")


def test_the_digest_follows_settings_and_data_and_not_the_layout(write_suite: Callable[..., Path]):
    digest = load_suite(write_suite(TASK)).digest

    reordered = load_suite(write_suite("tasks:\n  - metrics: [nll, chrf]\n    data: rows.jsonl\n    name: t\n")).digest
    other_data = load_suite(write_suite(TASK, rows=[{"prompt": "p", "target": "t"}])).digest
    other_limit = load_suite(write_suite(TASK.replace("}", ", limit: 3}"))).digest

    assert reordered == digest
    assert len({digest, other_data, other_limit}) == 3


def test_a_smaller_limit_takes_a_subset_in_the_order_of_the_file(write_suite: Callable[..., Path]):
    rows = [{"id": str(i), "prompt": f"p{i}", "target": "t"} for i in range(50)]
    (task,) = load_suite(write_suite(TASK, rows=rows)).tasks

    few, many = task.samples(5), task.samples(20)

    assert set(few) < set(many)
    assert [int(row.id) for row in many] == sorted(int(row.id) for row in many)
    assert [int(row.id) for row in few] != list(range(5))
    assert len(task.samples()) == 50
