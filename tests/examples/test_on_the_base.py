"""The base is built offline to known bytes, and the shipped adapters do on it what their cards claim."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from adapterctl.examples import BASE_NAME, base, corpora

EXAMPLES = Path(base.__file__).parent
DIGESTS = {
    "config.json": "5e31dfb69fb3da127ec6dbb90f044de7fe34711c02140a7bc5769d4ff3d40bec",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base.build_base(tmp_path_factory.mktemp("bases") / BASE_NAME)


def test_a_build_gives_the_bytes_that_the_adapters_were_trained_on(base_folder: Path):
    built = {name: hashlib.sha256((base_folder / name).read_bytes()).hexdigest() for name in DIGESTS}

    assert built == DIGESTS


def test_a_build_leaves_one_folder_that_others_can_read(base_folder: Path):
    assert list(base_folder.parent.iterdir()) == [base_folder]
    assert base_folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in base_folder.iterdir()} == {0o644}


@pytest.mark.parametrize("task", corpora.TASKS)
def test_every_version_loads_in_peft_and_the_last_one_beats_the_base_by_far(task: corpora.Task, base_folder: Path):
    from adapterctl.examples.train import VERSIONS, measure  # deferred: torch and PEFT, which the rest does without

    samples = corpora.read_suite(task, EXAMPLES / "suites")[:12]

    losses = measure(base_folder, EXAMPLES / "adapters" / task, samples)

    versions = [f"v{number}" for number in range(1, len(VERSIONS[task]) + 1)]
    assert list(losses) == ["base", *versions]
    assert losses[versions[-1]] < losses["base"] - 0.8
