"""A batch file is read whole before anything is registered."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_tiny_adapter

from adapterctl.cli.batch import read_batch
from adapterctl.registry.domain.errors import InvalidInput, NotFound


def batch(folder: Path, text: str) -> Path:
    path = folder / "batch.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_have_the_names_of_the_options_and_folders_beside_the_file(tmp_path: Path):
    (tmp_path / "suite.yaml").touch()
    write_tiny_adapter(tmp_path / "v2")
    path = batch(
        tmp_path,
        """
- source: ./v2
  name: translate
  from: translate:v1
  metrics: {bleu: 0.31, step: 300}
  params: {lr: 0.0002}
  suite: suite.yaml
- {source: "hf://org/repo@main", name: chat, suite: chat}
""",
    )

    first, second = read_batch(path)

    assert (first.source, first.name, first.trained_from) == (str(tmp_path / "v2"), "translate", "translate:v1")
    assert (first.metrics, first.params) == ({"bleu": 0.31, "step": 300.0}, {"lr": 0.0002})
    assert first.suite == str(tmp_path / "suite.yaml")
    assert (second.source, second.suite) == ("hf://org/repo@main", "chat")


def test_every_bad_entry_is_named_at_once(tmp_path: Path):
    for name in ("a", "b", "c"):
        write_tiny_adapter(tmp_path / name)
    path = batch(
        tmp_path,
        """
- {source: a, name: good}
- {source: b, name: "Bad Name"}
- {source: c, name: x, metric: {bleu: 1}}
- {source: "hf://org/repo", name: x}
- {name: x}
- {source: gone, name: x}
""",
    )

    with pytest.raises(InvalidInput) as caught:
        read_batch(path)

    assert [problem.message.partition(":")[0] for problem in caught.value.problems] == ["2", "3", "4", "5", "6"]
    assert "unknown field `metric`" in str(caught.value)
    assert "gone is not there" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "a: b", "- 1", "- {source: [", "\x00", "- {source: a, name: x, name: y}"])
def test_what_is_no_list_of_adapters_is_refused(text: str, tmp_path: Path):
    with pytest.raises(InvalidInput):
        read_batch(batch(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(NotFound, match="no file"):
        read_batch(tmp_path / "none.yaml")
