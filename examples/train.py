"""Train the example adapters: two LoRA families on one small base, their checkpoints being the versions.

    python -m adapterctl.examples.train translate --base ~/.cache/base --out examples

writes the held-out samples (`suites/`), the adapters (`adapters/TASK/vN/`) and their model cards, which state the
loss on the held-out samples before and after. Seeded and on one thread: the same machine gives the same bytes,
another processor rounds differently and gives adapters that differ in the last bits and agree in their figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from . import BASE_NAME
from .base import build_base
from .cards import write_card
from .corpora import TASKS, Sample, Task, read_suite, split, write_suite

SEED = 7
BATCH = 16
# The few exchanges of `chat` are learned by heart at the rate that suits the catalogues.
LEARNING_RATE: dict[Task, float] = {"translate": 2e-3, "chat": 1e-3}
WARM_UP = 10
# Batches of similar length are cut from windows of this many batches: less padding, still a random order.
WINDOW = 8
# Steps after which a version is saved; the last one ends the cosine.
VERSIONS: dict[Task, tuple[int, ...]] = {"translate": (30, 100, 240), "chat": (5, 12, 24, 42, 72)}


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one sample, and where its target (with end of text) begins."""

    ids: list[int]
    target_at: int


def main() -> None:
    """Train one family, then measure the base and every version of it on the held-out samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model; made when missing")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets suites/ and adapters/")
    parser.add_argument("--measure-only", action="store_true", help="write the cards of adapters that exist")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the number of threads changes the order of sums and with it the last bits
    folder = options.out / "adapters" / options.task
    build_base(options.base)
    if not options.measure_only:
        (options.out / "suites").mkdir(parents=True, exist_ok=True)
        write_suite(options.task, options.out / "suites")
        train(options.task, options.base, folder)
    held_out = read_suite(options.task, options.out / "suites")
    losses = measure(options.base, folder, held_out)
    steps = VERSIONS[options.task]
    for number, step in enumerate(steps, start=1):
        write_card(
            folder / f"v{number}",
            options.task,
            number=number,
            step=step,
            steps=steps[-1],
            samples=len(held_out),
            losses=losses,
        )
    print(json.dumps(losses))


def train(task: Task, base: Path, folder: Path) -> None:
    """Train on the task's training samples and save a version at each of its steps."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = [encode(tokenizer, sample) for sample in split(task)[0]]
    torch.manual_seed(SEED)
    model = get_peft_model(_load(base), lora_config())
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE[task], weight_decay=0.0)
    steps = VERSIONS[task][-1]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    started = time.monotonic()
    for step, batch in enumerate(islice(batches(examples), steps), start=1):
        nll, tokens = target_nll(model, batch)
        loss = nll / tokens
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"{task} step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
        if step in VERSIONS[task]:
            save(model, folder / f"v{VERSIONS[task].index(step) + 1}")


def lora_config() -> LoraConfig:
    """Rank 4 on the feed-forward layers, scaled by alpha / r = 2."""
    return LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.05,
        target_modules=["down_proj", "gate_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Example:
    """Prompt, target and end of text; prompt and target meet at a space, so they can be encoded apart."""
    prompt = tokenizer(sample.prompt, add_special_tokens=False).input_ids
    target = tokenizer(sample.target, add_special_tokens=False).input_ids
    return Example([*prompt, *target, tokenizer.eos_token_id], target_at=len(prompt))


def batches(examples: list[Example]) -> Iterator[list[Example]]:
    """Endless batches: each pass in a new order, with texts of like length together."""
    order = random.Random(SEED)
    while True:
        shuffled = order.sample(examples, len(examples))
        cut: list[list[Example]] = []
        for at in range(0, len(shuffled), BATCH * WINDOW):
            window = sorted(shuffled[at : at + BATCH * WINDOW], key=lambda example: len(example.ids))
            cut += [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
        order.shuffle(cut)
        yield from cut


def target_nll(model: PeftModel, batch: list[Example]) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood (nats) of the targets of a batch, summed, and the number of their tokens."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    real = torch.zeros_like(ids)
    wanted = torch.zeros_like(ids, dtype=torch.bool)  # positions whose next token belongs to a target
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        real[row, : len(example.ids)] = 1
        wanted[row, example.target_at - 1 : len(example.ids) - 1] = True
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=real).last_hidden_state
    # The vocabulary is 85 times wider than the model: logits are made only where a target token is scored.
    logits = causal.lm_head(hidden[wanted])
    nll = torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[wanted], reduction="sum")
    return nll, int(wanted.sum())


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT would, in bf16, with a configuration whose bytes do not depend on the run."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    # PEFT keeps the targets as a set, whose order changes from run to run, and the base as a path of this machine.
    config |= {
        "base_model_name_or_path": BASE_NAME,
        "target_modules": sorted(config["target_modules"]),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure(base: Path, folder: Path, samples: list[Sample]) -> dict[str, float]:
    """Loss in nats per target token, end of text included, of the base and of each version, from their files."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = sorted((encode(tokenizer, sample) for sample in samples), key=lambda example: len(example.ids))
    versions = sorted(path.name for path in folder.iterdir())
    model = PeftModel.from_pretrained(_load(base), folder / versions[0], adapter_name=versions[0])
    for version in versions[1:]:
        model.load_adapter(folder / version, adapter_name=version)
    model.eval()
    assert not any(module.training for module in model.modules()), "dropout would change the figures"
    with model.disable_adapter():
        losses = {"base": _loss(model, examples)}
    for version in versions:
        model.set_adapter(version)
        losses[version] = _loss(model, examples)
    return losses


def _loss(model: PeftModel, examples: list[Example]) -> float:
    with torch.no_grad():
        parts = [target_nll(model, examples[at : at + BATCH]) for at in range(0, len(examples), BATCH)]
    return sum(float(nll) for nll, _ in parts) / sum(tokens for _, tokens in parts)


def _load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


if __name__ == "__main__":
    main()
