"""What one candidate of a search costs: made in the loaded model, or as PEFT users do it, by merge, save and reload."""

from __future__ import annotations

import time
from pathlib import Path

from article import PARENTS, ROOT, search_plan
from measure import Figure, bench

from adapterctl.examples.base import build_base
from adapterctl.workers.eval_engine import Engine
from adapterctl.workers.tune_job import Bench

SAMPLES = 16
WEIGHTS = (0.9, 0.7)


@bench(
    "candidate_vs_peft",
    "one candidate of a search (new weights, 8 samples a task by likelihood), made in the loaded model, against PEFT's"
    " merge, save, reload and the same evaluation",
    unit="×",
    at_least=3,
)
def candidate_vs_peft(room: Path) -> Figure:
    base = build_base(room / "smollm2-135m-instruct-q4_1-dequantised")
    plan = search_plan(SAMPLES, 24, base)
    ours = Bench(plan, lambda message: None, lambda: False, threads=1)
    for place, task in enumerate(plan.tasks):  # the base is loaded and the factors are read: once a search
        ours.look(ours.candidate(0, (1.0, 1.0)), place, task.tuning[:1], "warm up")
    started = time.perf_counter()
    with ours.candidate(0, WEIGHTS):
        made = time.perf_counter() - started
        mine = [sample["nll"] for p, t in enumerate(plan.tasks) for sample in ours.answer(p, t.tuning, "candidate")]
    took = time.perf_counter() - started

    started = time.perf_counter()
    _merge_by_peft(base, room / "merged")
    engine = Engine(base, device="cpu", batch_size=8, threads=1, tick=lambda samples: None)
    with engine.subject(room / "merged"):
        reloaded = time.perf_counter() - started
        theirs = [sample["nll"] for task in plan.tasks for sample in engine.answer(task.task, task.tuning).samples]
    peft = time.perf_counter() - started
    apart = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
    return Figure(
        peft / took,
        f"{took:.1f} s, {made * 1e3:.0f} ms of them to make it, against {peft:.1f} s, {reloaded:.1f} s of them"
        f" to merge, save and reload; likelihoods agree to {apart:.1e}",
    )


def _merge_by_peft(base: Path, out: Path) -> None:
    # deferred: only this needs them in this process
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    first, second = (str(ROOT / "examples" / "adapters" / parent) for parent in PARENTS)
    merged = PeftModel.from_pretrained(model, first, adapter_name="p0")
    merged.load_adapter(second, adapter_name="p1")
    merged.add_weighted_adapter(["p0", "p1"], list(WEIGHTS), "merged", combination_type="cat")
    merged.save_pretrained(out, selected_adapters=["merged"])
    for path in (out / "merged").iterdir():
        path.rename(out / path.name)
