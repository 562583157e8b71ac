"""What one candidate of a search costs: made in the loaded model, or as people do it who have PEFT alone.

The other side is a script in one process: load the base and both parents, `add_weighted_adapter`, `save_pretrained`;
load base and result from disk; score the same samples with lm-eval's own `HFLM`, padded batches of 8. Generous to it:
the start of a process with torch and lm-eval (10 s) is not counted, the files lie in the page cache, and lm-eval is
called with requests, not by its command. Ours loads base and parents once a search, which is not counted either. Both
sides compute in one thread, and take turns; but transformers reads a base in several, so CPU-seconds are compared, the
least of the rounds. Four fifths of ours are products with the base's weights: how large the ratio is depends on how
fast a machine multiplies against how fast it copies memory.

The likelihoods are compared by the token: lm-eval takes torch's log_softmax, whose float32 sum over the vocabulary is
off by up to 3e-5 nats on some processors, always to the same side; the logsumexp here is within 2e-6 of float64.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from article import PARENTS, ROOT, search_plan
from measure import Figure, bench, take_turns

from adapterctl.examples.base import build_base
from adapterctl.registry.domain.tuning import TunePlan
from adapterctl.workers.tune_job import Bench

SAMPLES = 16
WEIGHTS = ((0.9, 0.7), (0.8, 0.95), (1.1, 0.6), (0.7, 1.05))
ROUNDS = 3


@bench(
    "candidate_vs_peft",
    "one candidate of a search (new weights, 8 samples a task by likelihood), made in the loaded model, in CPU-seconds"
    " against PEFT's merge, save, reload and the same samples in lm-eval",
    unit="×",
    at_least=3,
    limit="the processor: it was 3.8× on an Intel Xeon, on which PEFT's merge, save and reload take longer",
)
def candidate_vs_peft(room: Path) -> Figure:
    base = build_base(room / "smollm2-135m-instruct-q4_1-dequantised")
    plan = search_plan(SAMPLES, 24, base)
    # in the type that PEFT computes in and saves; in the parents' bfloat16 the candidate would be another one
    kinds = tuple(replace(kind, recipe=replace(kind.recipe, dtype="F32")) for kind in plan.kinds)
    plan = replace(plan, kinds=kinds)
    ours = Bench(plan, lambda message: None, lambda: False, threads=1)
    mine: list[list[float]] = []
    theirs: list[list[float]] = []
    tokens: list[float] = []
    reloaded: list[float] = []

    def candidate() -> None:
        with ours.candidate(0, WEIGHTS[len(mine)]):
            answers = ours.answers([task.tuning for task in plan.tasks], "candidate")
        mine.append([sample["nll"] / sample["tokens"] for samples in answers for sample in samples])
        tokens[:] = [sample["tokens"] for samples in answers for sample in samples]

    def peft() -> None:
        started = time.process_time()
        model = _merge_and_reload(base, room / "merged", WEIGHTS[len(theirs)])
        reloaded.append(time.process_time() - started)
        theirs.append(_score(model, plan))

    turns = take_turns({"peft": peft, "candidate": candidate}, ROUNDS)
    apart = max(
        abs(one - other / count)
        for pair in zip(mine, theirs, strict=True)
        for one, other, count in zip(*pair, tokens, strict=True)
    )
    assert apart <= 1e-4, f"the likelihoods are {apart:.1e} nats a token apart"
    cpu = {side: min(seconds) for side, seconds in turns.cpu_seconds.items()}
    return Figure(
        turns.cpu_ratio("peft", "candidate"),
        f"CPU-seconds {cpu['candidate']:.2f} against {cpu['peft']:.2f}, {min(reloaded):.2f} or more of them to merge,"
        f" save and reload; by the clock {turns.median('candidate'):.1f} s against {turns.median('peft'):.1f} s"
        f" ({turns.ratio('peft', 'candidate'):.1f}×); likelihoods agree to {apart:.1e} nats a token",
    )


def _merge_and_reload(base: Path, out: Path, weights: tuple[float, float]) -> Any:
    # deferred: only this needs them in this process
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shutil.rmtree(out, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    first, second = (str(ROOT / "examples" / "adapters" / parent) for parent in PARENTS)
    merged = PeftModel.from_pretrained(model, first, adapter_name="p0")
    merged.load_adapter(second, adapter_name="p1")
    merged.add_weighted_adapter(["p0", "p1"], list(weights), "merged", combination_type="cat")
    merged.save_pretrained(out, selected_adapters=["merged"])
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    return PeftModel.from_pretrained(again, out / "merged").eval()


def _score(model: Any, plan: TunePlan) -> list[float]:
    # deferred: see above
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.base_folder, local_files_only=True)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)

    def requests() -> Iterator[list[Any]]:
        for task in plan.tasks:
            texts = [(row.prompt, row.target + tokenizer.eos_token) for row in task.tuning]
            yield [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]

    return [-score for batch in requests() for score, _ in lm.loglikelihood(batch, disable_tqdm=True)]
