"""One loaded base, adapters swapped on it, and what each of them says to a task's samples.

lm_eval does the work (tokens, stopping, generation). Likelihoods are computed here where the model allows it: samples
behind one another without padding, logits for the targets' tokens alone, which halves what they cost. What lm_eval does
not report is recorded: how many tokens a target has, and whether an answer ended by itself. Lives in the evaluation
child only: importing this file imports torch, transformers, peft and lm_eval.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..registry.domain.errors import Corrupt, InvalidInput, JobFailed, Unavailable
from ..registry.domain.evals import answer_statistics
from ..registry.domain.suite import Row, SuiteTask

#: Called with the number of samples that a batch has finished; may raise to stop the evaluation.
Tick = Callable[[int], None]
#: The tokens of a prompt and of its target.
Sample = tuple[list[int], list[int]]
#: The name of the one adapter that has no file.
CANDIDATE = "candidate"
#: Most tokens of a row of several samples, by kind of device: attention is computed over the whole row and then masked.
ROW_TOKENS = {"cpu": 512, "cuda": 4096}

logging.getLogger("lm_eval").setLevel(logging.ERROR)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Answers:
    """What one subject gave on one task: statistics for each sample, and the texts where some were generated."""

    samples: list[dict[str, float]]
    texts: list[str]


class Engine:
    """The base in float32 with adapters loaded from their files, one active at a time, never merged into it.

    Every adapter ever used stays loaded: a LoRA adapter is small beside its base, and PEFT activates another one by
    itself when the active one is deleted.
    """

    def __init__(self, base: Path, *, device: str, batch_size: int, threads: int, tick: Tick) -> None:
        torch.set_num_threads(threads)
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("torch sees no CUDA device", hint="set ADAPTERCTL_EVAL_DEVICE=cpu")
        self._device = device
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True).to(device)
        self._model.eval()
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        if not tokenizer.eos_token:
            raise InvalidInput(f"the tokenizer of {base.name} has no end-of-text token", hint="add one to the base")
        self._lm = _RecordingLM(self._model, tokenizer, batch_size, tick)
        self._peft: PeftModel | None = None
        self._loaded: dict[Path, str] = {}
        self._candidate: dict[str, torch.nn.Parameter] = {}
        self._untouched = self._probe()

    @contextmanager
    def subject(self, folder: Path | None) -> Iterator[None]:
        """Within the block the adapter in `folder` is active, or none: then the model is the bare base."""
        if folder is None:
            with self._bare():
                yield
            return
        peft = self._load(folder)
        peft.set_adapter(self._loaded[folder])
        yield

    @contextmanager
    def candidate(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within the block an adapter is active that has no file: its `tensors` by the key they would have in one.

        One slot in the model is filled anew each time, so all candidates of an engine have the same modules and at most
        the rank of the first `config`; rows and columns beyond a candidate's own rank are zeros, which is exact.
        """
        if not self._candidate:
            self._candidate = self._open_slot(config)
        with torch.no_grad():
            for key, parameter in self._candidate.items():
                parameter.zero_()
                tensor = tensors[key]
                room = parameter[tuple(slice(0, n) for n in tensor.shape)]
                room.copy_(tensor.reshape(room.shape))
        assert self._peft is not None
        self._peft.set_adapter(CANDIDATE)
        yield

    def answer(self, task: SuiteTask, rows: Sequence[Row]) -> Answers:
        """Score the targets, and generate answers where a metric of the task needs them."""
        training = next((name for name, module in self._model.named_modules() if module.training), None)
        if training is not None:
            # PEFT leaves the dropout of an adapter on in some ways of making one, while the model says it is off
            raise JobFailed(f"module {training!r} is in training mode, its dropout would falsify every figure")
        return self._lm.run(task, rows)

    def check_base(self) -> None:
        """Raise `Corrupt` unless the base gives the same bits as before the first adapter was loaded."""
        with self._bare():
            if not torch.equal(self._untouched, self._probe()):
                raise Corrupt(
                    "the base answers differently after adapters were swapped", hint="run the evaluation again"
                )

    @contextmanager
    def _bare(self) -> Iterator[None]:
        if self._peft is None:
            yield
            return
        with self._peft.disable_adapter():
            yield

    def _load(self, folder: Path) -> PeftModel:
        if self._peft is not None and folder in self._loaded:
            return self._peft
        name = f"subject{len(self._loaded)}"
        if self._peft is None:
            self._add(PeftConfig.from_pretrained(str(folder)), name)
        assert self._peft is not None
        # not `from_pretrained`, which only warns when weights and modules do not meet
        outcome = self._peft.load_adapter(str(folder), adapter_name=name, torch_device=self._device)
        if outcome.missing_keys or outcome.unexpected_keys:
            keys = [*outcome.missing_keys, *outcome.unexpected_keys]
            raise Corrupt(f"the adapter does not fit the base: {len(keys)} tensors do not meet, first {keys[0]}")
        self._peft.eval()
        self._loaded[folder] = name
        return self._peft

    def _open_slot(self, config: Mapping[str, Any]) -> dict[str, torch.nn.Parameter]:
        """Make the candidates' adapter; its parameters by the key that each has in a file."""
        # scaling is alpha / r = 1: weights and scaling of the parents are in the factors
        self._add(LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"}), CANDIDATE)
        assert self._peft is not None
        self._peft.eval()
        return {
            name.replace(f".{CANDIDATE}", ""): parameter
            for name, parameter in self._peft.named_parameters()
            if CANDIDATE in name.split(".")
        }

    def _add(self, config: PeftConfig, name: str) -> None:
        config.inference_mode = True
        if self._peft is None:
            self._peft = PeftModel(self._model, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)

    def _probe(self) -> torch.Tensor:
        ids = torch.arange(16, device=self._device).remainder(self._model.config.vocab_size).unsqueeze(0)
        with torch.inference_mode():
            return self._model(ids).logits.clone()


class _RecordingLM(HFLM):  # type: ignore[misc]  # lm_eval ships no types
    """lm_eval's model on one of ours that is loaded already, with a record of what it keeps to itself.

    `_loglikelihood_tokens`, `_model_call`, `_model_generate` and the cache hook are not public; a test holds the
    results against a plain loop over the same model, and another one against lm_eval as it is.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, tick: Tick) -> None:
        # with logits_cache, requests that share a context are answered from one batch row and would not be counted
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, logits_cache=False)
        self._tick = tick
        self._in_rows = _takes_rows(model)
        self._target_tokens: list[int] = []
        self._generated: deque[list[int]] = deque()
        self._ended: dict[str, bool] = {}
        self._stop: tuple[str, ...] = ()
        ends = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.cache_hook = self  # told of each answer, in the order in which rows were generated

    def run(self, task: SuiteTask, rows: Sequence[Row]) -> Answers:
        self._stop, self._ended = task.stop, {}
        parts = _compile(task, rows, self.tokenizer.eos_token)
        loaded = TaskManager(include_defaults=False).load(parts)
        done = evaluate(lm=self, task_dict=loaded, bootstrap_iters=0, log_samples=True)["samples"]
        scores = [sample["resps"][0][0][0] for sample in _in_order(done["likelihood"])]
        if not all(map(math.isfinite, scores)):
            raise JobFailed(f"the likelihood on {task.name} is not finite", hint="the adapter's weights are broken")
        samples: list[dict[str, float]] = [
            {"nll": -score, "tokens": tokens, "bytes": len(row.target.encode())}
            for score, tokens, row in zip(scores, self._target_tokens, rows, strict=True)
        ]
        texts = [sample["resps"][0][0] for sample in _in_order(done["answers"])] if task.generates else []
        for sample, text, row in zip(samples, texts, rows, strict=False):
            sample.update(answer_statistics(text, row.target, ended=self._ended[row.prompt]))
        return Answers(samples, texts)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        for (prompt, _), context, target in requests:
            self._check_length(prompt, len(context) + len(target))
        self._target_tokens = [len(target) for _, _, target in requests]
        if not self._in_rows:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        scores: list[float] = []
        for row in _rows([request[1:] for request in requests], self.batch_size, ROW_TOKENS[self.device.type]):
            scores += self._score(row)
            self._tick(len(row))
        # whether a target is what greedy decoding gives, lm_eval's second answer, no metric of ours asks
        return [(score, False) for score in scores]

    def _score(self, row: Sequence[Sample]) -> list[float]:
        """The log-likelihood of each target, from one pass over all samples of the row."""
        ids: list[int] = []
        positions: list[int] = []
        before_targets: list[int] = []
        for context, target in row:
            first = len(ids) + len(context) - 1  # the logits for a token stand at the one before it
            ids += [*context, *target[:-1]]
            positions += range(len(context) + len(target) - 1)
            before_targets += range(first, first + len(target))
        targets = torch.tensor([token for _, target in row for token in target], device=self.device)
        with torch.inference_mode():
            logits = _logits(self.model, ids, positions, before_targets).float()
            scores = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        return [float(part.double().sum()) for part in scores.split([len(target) for _, target in row])]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._tick(inps.shape[0])
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        self._check_length("an answer", max_length)
        rows = super()._model_generate(context, max_length, stop, **kwargs)
        self._generated.extend(rows[:, context.shape[1] :].tolist())
        self._tick(rows.shape[0])
        return rows

    def add_partial(self, attribute: str, request: Any, result: Any) -> None:
        """lm_eval's cache hook. It caches nothing: keyed without the adapter, its answers would be another one's."""
        if attribute != "generate_until":
            return
        tokens = self._generated.popleft()
        by_stop = any(stop in self.tok_decode(tokens) for stop in self._stop)
        self._ended[request[0]] = by_stop or not self._ends.isdisjoint(tokens)

    def _check_length(self, what: str, tokens: int) -> None:
        if tokens > self.max_length:  # lm_eval would cut off the beginning and go on
            raise InvalidInput(
                f"{what[:60]!r} needs {tokens} tokens, the base takes {self.max_length}",
                hint="shorten the samples or lower max_new_tokens",
            )


def _rows(samples: Sequence[Sample], most: int, most_tokens: int) -> Iterator[list[Sample]]:
    """The samples in their order, so many together as the limits allow, and one at least."""
    row: list[Sample] = []
    tokens = 0
    for sample in samples:
        length = len(sample[0]) + len(sample[1])
        if row and (len(row) == most or tokens + length > most_tokens):
            yield row
            row, tokens = [], 0
        row.append(sample)
        tokens += length
    if row:
        yield row


def _takes_rows(model: Any) -> bool:
    """Whether this model keeps samples apart that stand in one row, each with positions from 0, and picks logits.

    It is tried: whether transformers finds the bounds in the positions depends on how the model was written.
    """
    if not {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        return False
    one, other = ([(start + 7 * i) % model.config.vocab_size for i in range(12)] for start in (5, 11))
    with torch.inference_mode():
        alone = model(torch.tensor([other], device=model.device)).logits[0]
        behind = _logits(model, one + other, [*range(12), *range(12)], list(range(12, 24)))
    # a second sample that saw the first one is as far from itself alone as another text
    return bool((alone - behind).norm() <= 1e-3 * alone.norm())


def _logits(model: Any, ids: Sequence[int], positions: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """Logits at these places of one row, (places, vocabulary)."""
    logits: torch.Tensor = model(
        torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        logits_to_keep=torch.tensor(places, device=model.device),
        use_cache=False,  # with a cache, transformers does not look for bounds
    ).logits[0]
    return logits


def _compile(task: SuiteTask, rows: Sequence[Row], end: str) -> list[dict[str, Any]]:
    """The task as lm_eval knows it. Texts are rendered already, so no template of its own is ever run."""
    # the likelihood counts the end of text only if it is written out
    parts = [_part("likelihood", "loglikelihood", [(row.prompt, row.target + end) for row in rows])]
    if task.generates:
        settings = {"until": list(task.stop), "max_gen_toks": task.max_new_tokens, "do_sample": False}
        answers = _part("answers", "generate_until", [(row.prompt, row.target) for row in rows])
        parts.append(answers | {"generation_kwargs": settings})
    return parts


def _part(name: str, kind: str, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    documents = Dataset.from_list([{"prompt": prompt, "target": target} for prompt, target in texts])
    return {
        "task": name,
        "output_type": kind,
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "num_fewshot": 0,
        # its own metrics are not used: they would average over samples, not over tokens
        "process_results": lambda document, results: {"done": 1},
        "metric_list": [{"metric": "done", "aggregation": sum, "higher_is_better": True}],
    }


def _in_order(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))
