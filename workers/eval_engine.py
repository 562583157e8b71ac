"""One loaded base, adapters swapped on it, and what each of them says to a task's samples.

lm_eval does the work (tokens, stopping, generation). Likelihoods are computed here where the model allows it: samples
side by side without padding, logits for the targets' tokens alone, which more than halves what they cost. What
lm_eval does not report is recorded: how many tokens a target has, and whether an answer ended by itself. Lives in the
evaluation child only: importing this file imports torch, transformers, peft and lm_eval.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from ..registry.domain.adapter import PLAIN_NAMES
from ..registry.domain.base_dtype import FOUR_BITS, FULL
from ..registry.domain.errors import Corrupt, InvalidInput, JobFailed, Unavailable
from ..registry.domain.evals import answer_statistics
from ..registry.domain.suite import Row, SuiteTask

#: Called with the number of samples that a batch has finished; may raise to stop the evaluation.
Tick = Callable[[int], None]
#: The tokens of a prompt and of its target.
Sample = tuple[list[int], list[int]]
#: The name of the one adapter that has no file.
CANDIDATE = "candidate"
#: About so many tokens go through the model at once where samples stand side by side, by kind of device.
PASS_TOKENS = {"cpu": 512, "cuda": 4096, "mps": 4096}
#: So many rows of logits are summed over the vocabulary at once.
NORM_ROWS = 16

logging.getLogger("lm_eval").setLevel(logging.ERROR)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Answers:
    """What one subject gave on one task: statistics for each sample, and the texts where some were generated."""

    samples: list[dict[str, float]]
    texts: list[str]


class Engine:
    """The base, in float32 or in fewer bits, with adapters loaded from their files, one active at a time, never merged.

    Every adapter ever used stays loaded: a LoRA adapter is small beside its base, and PEFT activates another one by
    itself when the active one is deleted.
    """

    def __init__(
        self, base: Path, *, device: str, dtype: str = FULL, batch_size: int, threads: int, tick: Tick
    ) -> None:
        torch.set_num_threads(threads)
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("torch sees no CUDA device", hint="set ADAPTERCTL_EVAL_DEVICE=cpu")
        self._device = device
        self._model = _load(base, device, dtype)
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
        if self._peft.active_adapter != CANDIDATE:  # it walks through all modules three times
            self._peft.set_adapter(CANDIDATE)
        yield

    def answer(self, task: SuiteTask, rows: Sequence[Row]) -> Answers:
        """Score the targets, and generate answers where a metric of the task needs them."""
        return self.answers([(task, rows)])[0]

    def answers(self, asked: Sequence[tuple[SuiteTask, Sequence[Row]]]) -> list[Answers]:
        """The same for several tasks: few samples of each are scored faster together."""
        training = next((name for name, module in self._model.named_modules() if module.training), None)
        if training is not None:
            # PEFT leaves the dropout of an adapter on in some ways of making one, while the model says it is off
            raise JobFailed(f"module {training!r} is in training mode, its dropout would falsify every figure")
        return self._lm.run(asked)

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
        outcome = self._peft.load_adapter(
            str(folder), adapter_name=name, torch_device=self._device, key_mapping=dict(PLAIN_NAMES)
        )
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
        for module in self._peft.modules():
            if isinstance(module, LoraLinear):
                module.lora_variant[CANDIDATE] = _AddInPlace
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


def _load(base: Path, device: str, dtype: str) -> Any:
    """The base's model: as it is stored where that is quantised, else in `dtype`; what is not quantised in float32."""
    options: dict[str, Any] = {}
    if dtype != FULL:
        options["device_map"] = {"": device}  # what is quantised cannot be moved
    if dtype in FOUR_BITS and not _is_quantised(base):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=dtype == "nf4-dq",
            bnb_4bit_compute_dtype=torch.float32,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, **options)
    except (ImportError, RuntimeError, ValueError) as error:
        if dtype == FULL:
            raise
        raise JobFailed(f"the base cannot be loaded in {dtype} here: {error}") from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # on a CPU with bfloat16 bitsandbytes would round inputs and scales to it, whatever the compute dtype says:
            # other figures than on other machines, and it takes no widths but multiples of 64
            module.support_avx512bf16_for_cpu = False
    return model if options else model.to(device)


def _is_quantised(base: Path) -> bool:
    return getattr(AutoConfig.from_pretrained(base, local_files_only=True), "quantization_config", None) is not None


class _AddInPlace:
    """A variant of LoRA, as PEFT calls it, for a scaling of 1 and no dropout: the same bits by fewer passes."""

    @staticmethod
    def forward(
        module: LoraLinear, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        return result.add_(module.lora_B[active_adapter](module.lora_A[active_adapter](x)))


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

    def run(self, asked: Sequence[tuple[SuiteTask, Sequence[Row]]]) -> list[Answers]:
        # the likelihood counts the end of text only if it is written out
        texts = [(row.prompt, row.target + self.tokenizer.eos_token) for _, rows in asked for row in rows]
        scores = [score for score, _ in self.loglikelihood(_requests("loglikelihood", texts))]
        scored = iter(zip(scores, self._target_tokens, strict=True))
        return [self._answers(task, rows, list(islice(scored, len(rows)))) for task, rows in asked]

    def _answers(self, task: SuiteTask, rows: Sequence[Row], scored: Sequence[tuple[float, int]]) -> Answers:
        """`scored` is the log-likelihood of each target, and how many tokens it has."""
        if not all(math.isfinite(score) for score, _ in scored):
            raise JobFailed(f"the likelihood on {task.name} is not finite", hint="the adapter's weights are broken")
        samples: list[dict[str, float]] = [
            {"nll": -score, "tokens": tokens, "bytes": len(row.target.encode())}
            for (score, tokens), row in zip(scored, rows, strict=True)
        ]
        texts = self._generate(task, rows) if task.generates else []
        for sample, text, row in zip(samples, texts, rows, strict=False):
            sample.update(answer_statistics(text, row.target, ended=self._ended[row.prompt]))
        return Answers(samples, texts)

    def _generate(self, task: SuiteTask, rows: Sequence[Row]) -> list[str]:
        self._stop, self._ended = task.stop, {}
        settings = {"until": list(task.stop), "max_gen_toks": task.max_new_tokens, "do_sample": False}
        texts: list[str] = self.generate_until(_requests("generate_until", [(row.prompt, settings) for row in rows]))
        return texts

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
        samples = [request[1:] for request in requests]
        scores: list[float] = []
        for together in _passes(samples, PASS_TOKENS[self.device.type]):
            scores += self._score(together)
            self._tick(len(together))
        # whether a target is what greedy decoding gives, lm_eval's second answer, no metric of ours asks
        return [(score, False) for score in scores]

    def _score(self, samples: Sequence[Sample]) -> list[float]:
        """The log-likelihood of each target, from one pass over all samples."""
        with torch.inference_mode():
            logits = _logits_before_targets(self.model, samples)
            targets = torch.tensor([token for _, target in samples for token in target], device=logits.device)
            # some rows at a time: the same bits, without a second array of the size of the logits
            norms = torch.cat([rows.logsumexp(1) for rows in logits.split(NORM_ROWS)])
            scores = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - norms
        return [float(part.double().sum()) for part in scores.split([len(target) for _, target in samples])]

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


def _requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """What lm_eval is asked. Texts are rendered already, so no template of its own is ever run."""
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def _passes(samples: Sequence[Sample], most_tokens: int) -> Iterator[list[Sample]]:
    """The samples in their order, so many together as the limit allows, and one at least."""
    together: list[Sample] = []
    tokens = 0
    for sample in samples:
        length = len(sample[0]) + len(sample[1])
        if together and tokens + length > most_tokens:
            yield together
            together, tokens = [], 0
        together.append(sample)
        tokens += length
    if together:
        yield together


def _rows(lengths: Sequence[int]) -> list[list[int]]:
    """Places of samples by the row that they stand in: rows of a width that leaves little room at their ends."""
    longest = max(lengths)

    def room(rows: list[list[int]]) -> int:
        return len(rows) * max(sum(lengths[place] for place in row) for row in rows)

    widths = range(longest, 2 * longest + 1, max(1, longest // 32))
    return min((_filled(lengths, width) for width in widths), key=room)


def _filled(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Longest first, each into the first row that has room for it."""
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        row = next((i for i, space in enumerate(left) if space >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(width)
        rows[row].append(place)
        left[row] -= lengths[place]
    return rows


def _logits_before_targets(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """(tokens of all targets, vocabulary), float32: at the place before each token.

    Several samples stand in one row, each with positions from 0. transformers sees the bounds in the positions, unless
    there is a cache; what is left of a row are samples of one token.
    """
    texts = [[*context, *target[:-1]] for context, target in samples]
    rows = _rows([len(text) for text in texts])
    width = max(sum(len(texts[place]) for place in row) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    before: list[Sequence[int]] = [()] * len(samples)
    for y, row in enumerate(rows):
        x = 0
        for place in row:
            end = x + len(texts[place])
            ids[y, x:end] = torch.tensor(texts[place])
            positions[y, x:end] = torch.arange(end - x)
            before[place] = range(y * width + end - len(samples[place][1]), y * width + end)
            x = end
    hidden = model.base_model(
        input_ids=ids.to(model.device), position_ids=positions.to(model.device), use_cache=False
    ).last_hidden_state
    places = torch.tensor([place for each in before for place in each], device=model.device)
    logits: torch.Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[places])
    return logits.float()


def _takes_rows(model: Any) -> bool:
    """Whether this model keeps samples apart that stand in one row, and its logits come from its last layer alone.

    It is tried: both depend on how the model was written, and some take no positions at all.
    """
    size = model.config.vocab_size
    # of the lengths 12, 7 and 5, so that the last one stands behind the second one
    samples = [([(start + 7 * i) % size for i in range(start)], [1, 2, 3]) for start in (10, 5, 3)]
    try:
        with torch.inference_mode():
            picked = _logits_before_targets(model, samples)
            whole = torch.cat([_alone(model, sample) for sample in samples])
    except (AttributeError, TypeError, ValueError):  # no base_model that takes these arguments, or no head of its own
        return False
    # rounding is 1e-6 of them; a sample that saw another one is far from itself alone
    return picked.shape == whole.shape and bool((picked - whole).norm() <= 1e-4 * whole.norm())


def _alone(model: Any, sample: Sample) -> torch.Tensor:
    context, target = sample
    ids = torch.tensor([[*context, *target[:-1]]], device=model.device)
    logits: torch.Tensor = model(ids).logits[0, -len(target) :].float()
    return logits
