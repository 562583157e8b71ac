"""The child process of a job: reads one task file, does the work, says how it went on stdout, and ends.

    python -m adapterctl.workers.runner TASKFILE

Each line on stdout is a JSON object: `progress` and `log` on the way, `result` or `error` last; exit code 0 or 1.
The child is a pure function of its task and the files that it names: it has no database, no MLflow and no tokens.
It dies with its parent, and on SIGTERM it stops between two modules or samples.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..registry.crashpoints import reached
from ..registry.domain.adapter import AdapterFacts, read_facts
from ..registry.domain.digest import file_digest
from ..registry.domain.errors import AdapterctlError, Corrupt, InvalidInput, LossTooHigh
from ..registry.domain.header import read_header
from ..registry.domain.plan import MergePlan
from ..registry.wire import from_builtins, to_builtins

#: Progress is told at most this often; the last step always is.
PROGRESS_EVERY_S = 0.2
#: Relative distance of two deltas that float64 arithmetic of another BLAS kernel explains, before rounding.
SAME_DELTA = 1e-6
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Conversation:
    """What the child says to its supervisor, and what it hears: SIGTERM, or silence where the supervisor died."""

    stage: str = "starting"
    stopping: bool = False
    parent: int = field(default_factory=os.getppid)
    _last: float = 0.0

    def say(self, line: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= PROGRESS_EVERY_S:
            self._last = now
            self.say({"progress": {"stage": self.stage, "done": done, "total": total}})

    def should_stop(self) -> bool:
        if os.getppid() != self.parent:
            die()
        return self.stopping

    def listen(self) -> None:
        """Stop on SIGTERM; be killed by the kernel when the thread that started us dies (Linux)."""
        signal.signal(signal.SIGTERM, self._on_term)
        with contextlib.suppress(OSError, AttributeError):  # no prctl: `should_stop` still looks at the parent
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self.should_stop()

    def _on_term(self, number: int, frame: object) -> None:
        self.stopping = True


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m adapterctl.workers.runner TASKFILE\n")
        return 2
    conversation = Conversation()
    conversation.listen()
    try:
        reached("child.started")
        result = run(json.loads(Path(arguments[0]).read_bytes()), conversation)
        reached("child.written")
    except AdapterctlError as error:
        conversation.say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        return 1
    except MemoryError:
        hint = "give it more memory, or fewer threads with ADAPTERCTL_THREADS"
        conversation.say({"error": {"code": "unavailable", "message": "the child ran out of memory", "hint": hint}})
        return 1
    conversation.say({"result": result})
    return 0


def run(task: dict[str, Any], conversation: Conversation) -> Mapping[str, Any]:
    """Do what the task says, and use it up. Raises errors of ours only."""
    kind = task.get("kind")
    if kind == "merge":
        return run_merge(task, conversation)
    if kind == "eval":
        # deferred: torch, transformers and lm_eval take seconds, and only this kind needs them
        from . import eval_job

        conversation.stage = "evaluate"
        result: Mapping[str, Any] = eval_job.run(task, conversation.say, conversation.should_stop)
        return result
    if kind == "tune":
        # deferred: numpy, and with it all that an evaluation takes
        from . import tune_job

        conversation.stage = "tune"
        return tune_job.run(task, conversation.say, conversation.should_stop)
    raise InvalidInput(f"task kind {kind!r} is unknown", hint="this child runs merge, eval and tune")


def run_merge(task: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
    """Check the parents, merge, prove; the stage folder then holds the three files of the child."""
    # deferred: numpy, which an evaluation brings along itself and a usage error does not need
    from ..registry.merging.tensors import digest_of
    from . import engine, receipt

    # taken out of the task, where it would hold a kilobyte a module more than the plan itself needs
    plan = from_builtins(task.pop("plan"), MergePlan)
    out, threads = Path(task["out"]), int(task["threads"])
    stop = conversation.should_stop
    conversation.stage = "check parents"
    parents = [_checked(parent) for parent in task["parents"]]

    if plan.max_loss is not None:
        conversation.stage = "predict"
        _refuse_loss(engine.predict_loss(plan, parents, threads=threads, should_stop=stop), plan.max_loss, "would lose")
    conversation.stage = "merge"

    def on_progress(done: int, total: int) -> None:
        conversation.progress(done, total)
        if done < total:
            reached("child.module")

    outcomes = engine.merge(plan, parents, out, threads=threads, on_progress=on_progress, should_stop=stop)
    conversation.stage = "prove"
    proven = receipt.prove(plan, parents, out, outcomes, threads=threads, should_stop=stop)
    proof, facts = proven.receipt, proven.facts
    if plan.max_loss is not None:
        # rounding to the output type is not what the limit is about, so the bound of it is allowed for; the bound does
        # not hold what values below the range of the type lose
        _refuse_loss(proof["loss"] - proof["loss_bound"], plan.max_loss, "lost")
    result = {
        "content_digest": digest_of(out / engine.WEIGHTS_FILE, facts),
        "receipt": proof,
        "facts": to_builtins(facts),
        "norms": dict(proven.norms),
    }
    if "compare" in task:
        stored = Path(task["compare"]["folder"]) / engine.WEIGHTS_FILE
        # the same arithmetic gives the same bytes; only another one may differ, by its rounding
        same_arithmetic = task["compare"]["fingerprint"] == proof["fingerprint"]
        bound = None if same_arithmetic else SAME_DELTA + 2 * receipt.ROUNDING[plan.recipe.dtype][0]
        result["comparison"] = _compare(stored, out / engine.WEIGHTS_FILE, facts, bound)
    return result


def _compare(stored: Path, again: Path, facts: AdapterFacts, bound: float | None) -> dict[str, Any]:
    """Is the file that the recipe gave now the one that is stored?

    `bound` is the relative distance that other arithmetic explains: SAME_DELTA plus one rounding of both factors, for
    other BLAS kernels give other last bits in float64 factors, which may round to a neighbour. They may also write one
    delta by other factors, at distance 0. None: the arithmetic is the same, and only the same bytes will do. Headers
    and biases need no BLAS and have to be equal in any case.
    """
    # deferred: see run_merge
    from ..registry.merging.distance import distances, in_all
    from ..registry.merging.tensors import TensorReader

    if file_digest(stored) == file_digest(again):
        return {"verdict": "identical", "distance": 0.0, "details": []}
    headers = read_header(stored), read_header(again)
    _, distance = in_all(distances(read_facts(facts.config, headers[0]), stored, facts, again, spaces=False))
    told = "distance unknown, for the stored deltas are zero" if distance is None else f"distance {distance:.3g}"
    details = [f"{told}, bound {bound or 0:.3g}"]
    if headers[0] != headers[1]:
        details.append("the headers differ")
    else:
        with TensorReader(stored) as one, TensorReader(again) as other:
            biases = [module.bias for module in facts.modules if module.bias]
            details += [f"{bias.key} differs" for bias in biases if one.raw(bias) != other.raw(bias)]
    within = bound is not None and distance is not None and distance <= bound and len(details) == 1
    return {"verdict": "equal within bound" if within else "different", "distance": distance, "details": details}


def _checked(parent: Mapping[str, Any]) -> Path:
    """The parent's weights file, after every file that the task lists has the digest that it lists."""
    folder = Path(parent["folder"])
    for name, expected in parent["sha256"].items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            raise Corrupt(
                f"{folder / name} cannot be read: {error.strerror}",
                hint="`adapterctl verify --all` names every damaged version",
            ) from error
        if found != expected:
            raise Corrupt(
                f"{folder / name} has SHA-256 {found[:12]}…, the manifest says {expected[:12]}…",
                hint="the stored file was changed; `adapterctl verify --all` names every damaged version",
            )
    return folder / "adapter_model.safetensors"


def _refuse_loss(loss: float, limit: float, verb: str) -> None:
    if loss > limit:
        raise LossTooHigh(
            f"the merge {verb} {loss:.4f} of the exact sum, --max-loss allows {limit:g}",
            hint="raise --rank, use --method cat or --dtype f32, or allow more; `adapterctl plan` shows all losses",
        )


def die() -> NoReturn:
    """The supervisor is gone and nobody hears us: end at once, as if killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
