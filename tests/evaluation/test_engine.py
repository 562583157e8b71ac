"""The evaluation child against a plain loop over the same model, and what swapping adapters must not do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import carrying
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from adapterctl.registry.domain.base_dtype import stored_dtype
from adapterctl.registry.domain.errors import Corrupt, InvalidInput, JobCancelled, JobFailed
from adapterctl.registry.domain.eval_plan import EvalPlan, Pair, Subject
from adapterctl.registry.domain.evals import EvalReport
from adapterctl.registry.domain.suite import Suite, SuiteTask
from adapterctl.registry.services.suites import load_suite
from adapterctl.registry.wire import from_json, to_builtins
from adapterctl.workers import eval_engine, eval_job
from adapterctl.workers.eval_engine import Engine

TASK = "tasks:\n  - {name: t, data: rows.jsonl, metrics: [nll, chrf], max_new_tokens: 24}\n"
ENGINE = {"device": "cpu", "dtype": "float32", "batch_size": "2"}
NEW_TOKENS = 24


@pytest.fixture
def suite(write_suite: Callable[..., Path]) -> Suite:
    return load_suite(write_suite(TASK))


@pytest.fixture
def engine(tiny_base: Path) -> Engine:
    return Engine(tiny_base, device="cpu", batch_size=2, threads=1, tick=lambda samples: None)


def _run(plan: EvalPlan, out: Path, should_stop: Callable[[], bool] = lambda: False) -> list[EvalReport]:
    out.mkdir(exist_ok=True)
    result = eval_job.run({"plan": to_builtins(plan), "out": str(out), "threads": 1}, lambda message: None, should_stop)
    return [from_json((out / name).read_bytes(), EvalReport) for name in result["reports"]]


def _plan(base: Path, suite: Suite, subjects: list[tuple[str, Path | None]]) -> EvalPlan:
    return EvalPlan(
        base_id="b",
        base_folder=str(base),
        subjects=tuple(Subject(digest, digest, str(folder) if folder else None) for digest, folder in subjects),
        suites={suite.digest: suite},
        pairs=tuple(Pair(digest, suite.digest, f"key-{digest}") for digest, _ in subjects),
        limit=None,
        engine=ENGINE,
    )


def _bare_loop(base: Path, adapter: Path | None, task: SuiteTask) -> list[dict[str, Any]]:
    """What the engine must give, written out: one sample and one token at a time, no batch and no cache."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    expected = []
    for row in task.rows:
        prompt = tokenizer.encode(row.prompt)
        target = [*tokenizer.encode(row.prompt + row.target)[len(prompt) :], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0]
            logprobs = logits.log_softmax(-1)
            nll = -sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(target))
            answer: list[int] = []
            while len(answer) < NEW_TOKENS and tokenizer.eos_token_id not in answer:
                answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
        expected.append(
            {
                "nll": nll,
                "tokens": len(target),
                "text": tokenizer.decode(answer, skip_special_tokens=True),
                "ended": tokenizer.eos_token_id in answer,
            }
        )
    return expected


def _figures(report: EvalReport) -> tuple[tuple[Mapping[str, float], ...], tuple[Mapping[str, Any], ...]]:
    return report.tasks[0].samples, report.outputs


def test_likelihoods_and_texts_equal_a_plain_loop(
    tiny_base: Path, tiny_adapters: tuple[Path, Path], suite: Suite, tmp_path: Path
):
    subjects = [("base", None), ("first", tiny_adapters[0]), ("second", tiny_adapters[1])]

    reports = _run(_plan(tiny_base, suite, subjects), tmp_path / "out")

    endings = []
    for (_, folder), report in zip(subjects, reports, strict=True):
        expected = _bare_loop(tiny_base, folder, suite.tasks[0])
        samples = report.tasks[0].samples
        assert [s["tokens"] for s in samples] == [e["tokens"] for e in expected]
        # batches are padded, so sums run in another order: float32 agrees to about 1e-6
        assert [s["nll"] for s in samples] == pytest.approx([e["nll"] for e in expected], rel=1e-5)
        assert [o["output"] for o in report.outputs] == [e["text"] for e in expected]
        assert [bool(s["ended"]) for s in samples] == [e["ended"] for e in expected]
        total = sum(e["nll"] for e in expected) / sum(e["tokens"] for e in expected)
        assert report.tasks[0].metrics["nll"] == pytest.approx(total, rel=1e-5)
        endings += [e["ended"] for e in expected]
    assert True in endings  # else the test would say nothing about endings
    assert False in endings
    assert len({report.tasks[0].metrics["nll"] for report in reports}) == 3


@pytest.mark.parametrize("at_once", [40, 512])
def test_samples_in_rows_have_the_figures_of_padded_batches(
    engine: Engine, tiny_adapters: tuple[Path, Path], suite: Suite, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    monkeypatch.setitem(eval_engine.PASS_TOKENS, "cpu", at_once)
    task = suite.tasks[0]
    assert engine._lm._in_rows

    with engine.subject(tiny_adapters[0]):
        in_rows = engine.answers([(task, task.rows[:3]), (task, task.rows[3:])])
        engine._lm._in_rows = False
        padded = engine.answer(task, task.rows)

    together = [sample for answers in in_rows for sample in answers.samples]
    assert [s["nll"] for s in together] == pytest.approx([s["nll"] for s in padded.samples], rel=1e-5)
    assert [s["tokens"] for s in together] == [s["tokens"] for s in padded.samples]


def test_a_model_that_would_mix_up_the_samples_of_a_row_is_given_padded_batches():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.5))

    assert not eval_engine._takes_rows(bloom.eval())


def test_rows_hold_every_sample_once_and_little_room():
    lengths = [46, 8, 16, 22, 19, 22, 16, 30, 13, 29, 15, 30, 17, 18, 19, 26]

    rows = eval_engine._rows(lengths)

    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    width = max(sum(lengths[place] for place in row) for row in rows)
    assert len(rows) * width <= 1.05 * sum(lengths)


def test_swapping_leaks_nothing(tiny_base: Path, tiny_adapters: tuple[Path, Path], suite: Suite, tmp_path: Path):
    first, second = tiny_adapters
    alone = _run(_plan(tiny_base, suite, [("first", first)]), tmp_path / "alone")[0]

    order = [("second", second), ("base", None), ("first", first), ("again", second), ("bare", None)]
    reports = dict(zip([n for n, _ in order], _run(_plan(tiny_base, suite, order), tmp_path / "all"), strict=True))

    assert _figures(reports["first"]) == _figures(alone)  # bit-equal, not only close
    assert _figures(reports["again"]) == _figures(reports["second"])
    assert _figures(reports["base"]) == _figures(reports["bare"])
    assert _figures(reports["base"]) != _figures(reports["first"])


@pytest.fixture(params=["nf4", "nf4-dq"])
def in_four_bits(request: pytest.FixtureRequest, tiny_base: Path) -> Engine:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: NO BASE WAS LOADED IN 4 BITS")
    return Engine(tiny_base, device="cpu", dtype=request.param, batch_size=2, threads=1, tick=lambda samples: None)


def test_a_base_in_four_bits_gives_what_its_rounded_weights_give_in_float32(
    in_four_bits: Engine, engine: Engine, tiny_adapters: tuple[Path, Path], suite: Suite
):
    from bitsandbytes.functional import dequantize_4bit  # deferred: without it these tests are skipped

    task = suite.tasks[0]
    with engine.subject(None):
        full = engine.answer(task, task.rows)
    rounded = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in in_four_bits._model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert {name.rpartition(".")[2] for name in rounded} >= {"q_proj", "o_proj", "up_proj", "down_proj"}
    with torch.no_grad():
        for name, weight in rounded.items():
            engine._model.get_submodule(name).weight.copy_(weight)

    for folder in (None, *tiny_adapters):
        with in_four_bits.subject(folder):
            found = in_four_bits.answer(task, task.rows)
        with engine.subject(folder):
            expected = engine.answer(task, task.rows)
        # float32 sums in the same order; products with bfloat16 would be some 1e-3 away
        assert [s["nll"] for s in found.samples] == pytest.approx([s["nll"] for s in expected.samples], rel=1e-5)
        assert found.texts == expected.texts
        assert found.texts != full.texts


def test_swapping_in_four_bits_leaks_nothing(
    in_four_bits: Engine, tiny_adapters: tuple[Path, Path], suite: Suite, tmp_path: Path
):
    task, ids = suite.tasks[0], torch.arange(24).unsqueeze(0)
    config = json.loads((tiny_adapters[0] / "adapter_config.json").read_text())
    factors = load_file(tiny_adapters[0] / "adapter_model.safetensors")
    candidate = {key: config[key] for key in ("peft_type", "task_type", "r", "target_modules")} | {"lora_alpha": 2}

    def logits() -> torch.Tensor:
        with in_four_bits.subject(None), torch.inference_mode():
            return in_four_bits._model(ids).logits.clone()

    before, answers = logits(), []
    for place in (0, 1, 0):
        with in_four_bits.subject(tiny_adapters[place]):
            answers.append(in_four_bits.answer(task, task.rows))
        # scaling is 8 / 2 in the file and 1 in the slot
        scaled = {key: 4 * factor if "lora_B" in key else factor for key, factor in factors.items()}
        with in_four_bits.candidate(candidate, scaled):
            answers.append(in_four_bits.answer(task, task.rows))

    assert torch.equal(before, logits())
    in_four_bits.check_base()
    first, in_memory, second, _, again, _ = answers
    assert (first.samples, first.texts) == (again.samples, again.texts)
    assert first.samples != second.samples
    assert (in_memory.samples, in_memory.texts) == (first.samples, first.texts)


def test_a_base_that_is_stored_in_four_bits_is_loaded_as_it_is(in_four_bits: Engine, tiny_base: Path, tmp_path: Path):
    ids = torch.arange(24).unsqueeze(0)
    folder = Path(shutil.copytree(tiny_base, tmp_path / "stored"))
    (folder / "model.safetensors").unlink()
    in_four_bits._model.save_pretrained(folder)
    dtype = stored_dtype(json.loads((folder / "config.json").read_text()))
    assert dtype is not None

    stored = Engine(folder, device="cpu", dtype=dtype, batch_size=2, threads=1, tick=lambda samples: None)

    with torch.inference_mode():
        assert torch.equal(stored._model(ids).logits, in_four_bits._model(ids).logits)


def test_a_base_that_was_changed_under_the_adapters_is_noticed(engine: Engine, tiny_adapters: tuple[Path, Path]):
    with engine.subject(tiny_adapters[0]):
        pass
    engine.check_base()

    with torch.no_grad():
        next(engine._model.parameters()).add_(1e-3)

    with pytest.raises(Corrupt):
        engine.check_base()


def test_dropout_that_is_on_stops_the_evaluation(engine: Engine, tiny_adapters: tuple[Path, Path], suite: Suite):
    with engine.subject(tiny_adapters[0]):
        next(m for n, m in engine._model.named_modules() if n.endswith("lora_dropout.subject0")).train()

        with pytest.raises(JobFailed) as failure:
            engine.answer(suite.tasks[0], suite.tasks[0].rows)

    assert "training mode" in failure.value.message


def test_names_with_an_adapter_name_in_them_are_those_of_peft(
    engine: Engine, tiny_adapters: tuple[Path, Path], tmp_path: Path
):
    named = carrying("mine", tiny_adapters[1], tmp_path / "named")

    with engine.subject(tiny_adapters[0]), engine.subject(tiny_adapters[1]):
        expected = engine._probe()
    with engine.subject(named):
        found = engine._probe()

    assert torch.equal(found, expected)
    assert not torch.equal(found, engine._untouched)


def test_an_adapter_of_another_shape_is_refused(engine: Engine, tiny_adapters: tuple[Path, Path], tmp_path: Path):
    config = json.loads((tiny_adapters[0] / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "up_proj", "down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").symlink_to(tiny_adapters[0] / "adapter_model.safetensors")

    with pytest.raises(Corrupt), engine.subject(tmp_path):
        pass


def test_a_stop_text_cuts_the_answer_and_counts_as_its_end(
    engine: Engine, suite: Suite, write_suite: Callable[..., Path]
):
    task = suite.tasks[0]
    whole = engine.answer(task, task.rows).texts
    letter = next(text[3] for text in whole if len(text) > 6 and text[3] not in text[:3] and text[3].isascii())
    stopping = load_suite(write_suite(TASK.replace("}", f", stop: [{json.dumps(letter)}]}}"), name="stopping")).tasks[0]

    answers = engine.answer(stopping, stopping.rows)

    assert answers.texts == [text.split(letter)[0] for text in whole]
    assert all(s["ended"] for s, text in zip(answers.samples, whole, strict=True) if letter in text)


def test_a_sample_that_the_base_cannot_hold_is_refused_and_not_cut(engine: Engine, write_suite: Callable[..., Path]):
    task = load_suite(write_suite(TASK, rows=[{"prompt": "x" * 200, "target": " y"}])).tasks[0]

    with pytest.raises(InvalidInput) as refusal:
        engine.answer(task, task.rows)

    assert "the base takes 128" in refusal.value.message


def test_a_stopped_evaluation_keeps_what_is_finished(
    tiny_base: Path, tiny_adapters: tuple[Path, Path], suite: Suite, tmp_path: Path
):
    plan = _plan(tiny_base, suite, [("base", None), ("first", tiny_adapters[0])])
    finished = tmp_path / "out" / "key-base.json"

    with pytest.raises(JobCancelled):
        _run(plan, tmp_path / "out", should_stop=finished.exists)

    assert [path.name for path in (tmp_path / "out").iterdir()] == [finished.name]
    assert from_json(finished.read_bytes(), EvalReport).subject == "base"


def test_a_task_that_was_finished_is_not_evaluated_again_whatever_attempt_did_it(
    tiny_base: Path, write_suite: Callable[..., Path], tmp_path: Path
):
    tasks = TASK + TASK.partition("\n")[2].replace("name: t", "name: u")
    plan = _plan(tiny_base, load_suite(write_suite(tasks)), [("base", None)])
    kept = tmp_path / "key-base-0.task"
    with pytest.raises(JobCancelled):
        _run(plan, tmp_path / "one", should_stop=kept.exists)
    told = json.loads(kept.read_text())
    told["outputs"][0]["output"] = "said by the first attempt"
    kept.write_text(json.dumps(told))

    (report,) = _run(plan, tmp_path / "two")
    kept.write_text("{")  # damaged: made again
    (anew,) = _run(plan, tmp_path / "three")

    assert report.outputs[0]["output"] == "said by the first attempt"
    assert [task.task for task in report.tasks] == ["t", "u"]
    assert anew.tasks == report.tasks
    assert anew.outputs[0]["output"] != report.outputs[0]["output"]
    assert anew.outputs[1:] == report.outputs[1:]


def test_progress_counts_every_sample(tiny_base: Path, suite: Suite, tmp_path: Path):
    plan, told = _plan(tiny_base, suite, [("base", None)]), []
    (tmp_path / "out").mkdir()

    eval_job.run({"plan": to_builtins(plan), "out": str(tmp_path / "out"), "threads": 1}, told.append, lambda: False)

    counts = [message["progress"]["done"] for message in told]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], told[0]["progress"]["total"]) == (0, 10, 10)
