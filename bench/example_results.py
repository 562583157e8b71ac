"""Evaluate the example family anew and write examples/results/: run it when an adapter, a suite or the engine changed.

    python bench/example_results.py [HOME]

The demo takes the figures of the base and of the shipped versions from there and computes those of the merges only.
About five minutes on two cores; the base model is made in HOME/bases when it is not there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterctl import examples
from adapterctl.examples import BASE_NAME
from adapterctl.registry.domain.eval_plan import BASE, EvalPlan, Pair, Subject
from adapterctl.registry.domain.evals import EvalReport
from adapterctl.registry.merging.tensors import measure
from adapterctl.registry.services.evaluate import engine_facts
from adapterctl.registry.services.register import WEIGHTS_FILE, inspect
from adapterctl.registry.services.suites import load_suite
from adapterctl.registry.settings import Settings
from adapterctl.registry.wire import from_json, to_builtins, to_json
from adapterctl.workers import eval_job

ROOT = Path(examples.__file__).parent
RESULTS = ROOT / "results"


def main() -> None:
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    suites = {suite.digest: suite for suite in (load_suite(path) for path in sorted(ROOT.glob("suites/*.yaml")))}
    subjects = [Subject(BASE, BASE, None), *map(_subject, sorted(ROOT.glob("adapters/*/v*")))]
    labels = {subject.digest: subject.label for subject in subjects}
    with tempfile.TemporaryDirectory() as out:
        plan = EvalPlan(
            base_id=BASE_NAME,
            base_folder=str(home / "bases" / BASE_NAME),
            subjects=tuple(subjects),
            suites=suites,
            pairs=tuple(Pair(s.digest, d, f"{s.label}-{suite.name}") for s in subjects for d, suite in suites.items()),
            limit=None,
            engine=engine_facts(Settings(home, eval_device="cpu")),
        )
        eval_job.run({"plan": to_builtins(plan), "out": out, "threads": 0}, _tell, lambda: False)
        reports = [from_json((Path(out) / f"{pair.key}.json").read_bytes(), EvalReport) for pair in plan.pairs]
    RESULTS.mkdir(exist_ok=True)
    for digest, label in labels.items():
        text = ",\n".join(to_json(report) for report in reports if report.subject == digest)
        (RESULTS / f"{label.replace(':', '-')}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _subject(folder: Path) -> Subject:
    facts = inspect(folder)
    digest = measure(folder / WEIGHTS_FILE, facts).content_digest
    return Subject(digest, f"{folder.parent.name}:{folder.name}", str(folder))


def _tell(message: Mapping[str, Any]) -> None:
    progress = message["progress"]
    print(f"{progress['done']:4d}/{progress['total']} {progress['stage']}", flush=True)


if __name__ == "__main__":
    main()
