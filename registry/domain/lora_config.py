"""What `adapter_config.json` may say: which fields change the mathematics, which do not, and which we cannot prove.

Every field of PEFT's LoraConfig has a role in `FIELD_ROLES` (a test compares the table with the installed PEFT), and a
field that is not there is refused unless it is null: an unknown field may change what the adapter computes. Values
come from strangers, so no regular expression of a config ever meets a backtracking engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from .errors import Problem

MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_PATTERN_LENGTH = 512
#: (keys of a pattern, or the parts of plain ones) x (modules): to compare a part takes a tenth of a microsecond, to
#: match a regular expression several.
MAX_PLAIN_COMPARISONS = 8_000_000
MAX_REGEX_COMPARISONS = 100_000
_MAX_REGEX_PROGRAM = 1_000
_MAX_TEXT = 1024
_SHOWN_PER_CODE = 3

FieldRole = Literal["respected", "derived", "recorded", "training", "refused"]

#: respected: changes the mathematics and is applied. derived: held against the tensors, which decide. recorded: kept,
#: changes nothing. training: had its effect before the file was written. refused: see `REFUSALS`.
FIELD_ROLES: Mapping[str, FieldRole] = {
    "r": "respected",
    "lora_alpha": "respected",
    "use_rslora": "respected",
    "rank_pattern": "respected",
    "alpha_pattern": "respected",
    "fan_in_fan_out": "respected",
    "lora_bias": "respected",
    "target_modules": "derived",
    "exclude_modules": "derived",
    "layers_to_transform": "derived",
    "layers_pattern": "derived",
    "base_model_name_or_path": "recorded",
    "revision": "recorded",
    "task_type": "recorded",
    "auto_mapping": "recorded",
    "peft_version": "recorded",
    "lora_dropout": "training",
    "inference_mode": "training",
    "runtime_config": "training",
    "eva_config": "training",
    "velora_config": "training",  # another backward pass; the forward pass is plain LoRA
    "loftq_config": "training",  # these three act through init_lora_weights, which is checked
    "corda_config": "training",
    "lora_ga_config": "training",
    "qalora_group_size": "training",  # read only under use_qalora, which is refused
    "merge_weights": "training",  # of PEFT before 0.3: whether `eval()` adds the delta to the weights
    "peft_type": "refused",
    "init_lora_weights": "refused",
    "bias": "refused",
    "modules_to_save": "refused",
    "trainable_token_indices": "refused",
    "ensure_weight_tying": "refused",
    "use_dora": "refused",
    "kasa_config": "refused",
    "alora_invocation_tokens": "refused",
    "use_qalora": "refused",
    "monteclora_config": "refused",
    "arrow_config": "refused",
    "use_bdlora": "refused",
    "layer_replication": "refused",
    "target_parameters": "refused",
    "megatron_config": "refused",
    "megatron_core": "refused",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is refused unless it holds one of `accepted`."""

    code: str
    reason: str
    hint: str = ""
    accepted: tuple[Any, ...] = (None, False, [], {})


_NOT_ADDITIVE = "train or convert it as plain LoRA"
REFUSALS: Mapping[str, Refusal] = {
    "peft_type": Refusal("not_lora", "only LoRA adapters are kept here", _NOT_ADDITIVE, accepted=("LORA",)),
    "bias": Refusal(
        "bias", "biases of the base were trained, they are no part of B·A", "train with bias='none'", (None, "none")
    ),
    "modules_to_save": Refusal(
        "modules_to_save", "whole modules of the base are replaced", "train with LoRA on those modules instead"
    ),
    "trainable_token_indices": Refusal("trainable_tokens", "rows of the embedding are replaced", _NOT_ADDITIVE),
    "ensure_weight_tying": Refusal(
        "tied_weights", "one pair of factors would serve two modules", "train with ensure_weight_tying=False"
    ),
    "use_dora": Refusal("dora", "DoRA rescales the sum of base and delta, so deltas do not add", _NOT_ADDITIVE),
    "kasa_config": Refusal("kasa", "KaSA cuts singular values off the base weight", _NOT_ADDITIVE),
    "alora_invocation_tokens": Refusal("alora", "activated LoRA applies to some tokens only", _NOT_ADDITIVE),
    "use_qalora": Refusal("qalora", "QA-LoRA pools the input before A", _NOT_ADDITIVE),
    "monteclora_config": Refusal("monteclora", "Monteclora samples its weights", _NOT_ADDITIVE),
    "arrow_config": Refusal("arrow", "Arrow routes each token among adapters", _NOT_ADDITIVE),
    "use_bdlora": Refusal("bdlora", "factors are block-diagonal, which a merge would not keep", _NOT_ADDITIVE),
    "layer_replication": Refusal("layer_replication", "the stack of layers of the base is rebuilt", _NOT_ADDITIVE),
    "target_parameters": Refusal(
        "target_parameters", "PEFT writes the target into the nesting of wrappers", "target modules instead"
    ),
    "megatron_config": Refusal("megatron", "layers are split over Megatron's ranks", "export it as plain LoRA"),
    "megatron_core": Refusal(
        "megatron", "it names a Python module to import", "remove the field", (None, "megatron.core")
    ),
}
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
#: These change the base weight when training starts, so B·A alone is not the adapter unless it was converted on saving.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PLAIN_KEY = re.compile(r"[A-Za-z0-9._-]+")
#: PEFT reads it as a regular expression, in which a dot would be any character; real ones are plain words.
_LAYER_LIST = re.compile(r"[A-Za-z0-9_-]+")
#: The common ground of Python's `re`, which PEFT uses, and RE2: what both accept, they read alike.
_COMMON_REGEX = re.compile(
    r"(?:[A-Za-z0-9._^$|)*+?-]|\((?!\?)|\(\?:|\{[0-9]{1,3}(?:,[0-9]{0,3})?\}"
    r"|\\[dDwWsSbB.^$|()\[\]{}*+?\\-]|\[\^?(?:[A-Za-z0-9_.-]|\\[dwsDWS.-])+\])+"
)

V = TypeVar("V", int, float)


class Findings:
    """Collects problems in the order they are found; of a thousand alike it keeps three and the count."""

    def __init__(self) -> None:
        self._found: dict[str, list[Problem]] = {}
        self._counts: dict[str, int] = {}

    def add(self, code: str, message: str, hint: str = "") -> None:
        self._counts[code] = self._counts.get(code, 0) + 1
        if self._counts[code] <= _SHOWN_PER_CODE:
            self._found.setdefault(code, []).append(Problem(code, message, hint))

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        for code, shown in self._found.items():
            found += shown
            if more := self._counts[code] - len(shown):
                found.append(Problem(code, f"and {more:,} more of the same kind"))
        return found


@dataclass(frozen=True, slots=True)
class Pattern(Generic[V]):
    """One entry of rank_pattern or alpha_pattern: a test on module names, and the value where it holds."""

    matches: Callable[[str], bool]
    value: V


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of a config that changes the mathematics. `targets` is None where the config gives a text, not a list:
    a regular expression or "all-linear". It is not run, for the tensors say which modules are adapted.
    """

    r: int
    alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    lora_bias: bool
    targets: frozenset[str] | None
    excluded: frozenset[str]
    layers: frozenset[int] | None
    layer_lists: tuple[str, ...]
    rank_pattern: tuple[Pattern[int], ...]
    alpha_pattern: tuple[Pattern[float], ...]
    base_name: str
    base_revision: str | None
    task_type: str | None

    def rank(self, module: str) -> int:
        return next((p.value for p in self.rank_pattern if p.matches(module)), self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora; of several patterns that match, the first one counts."""
        rank = self.rank(module)
        alpha = next((p.value for p in self.alpha_pattern if p.matches(module)), self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_targeted(self, module: str) -> bool:
        """PEFT's rule for lists: the whole name; or the end of it after a dot, in one of the layers."""
        if ends_in(module, self.excluded):
            return False
        if self.targets is None or module in self.targets:
            return True
        return ends_in(module, self.targets) and (self.layers is None or self._layer(module) in self.layers)

    def _layer(self, module: str) -> int | None:
        """The number of the layer that a module is in: the first one that follows the name of a list of layers."""
        parts = module.split(".")
        numbered = [i for i in range(1, len(parts) - 1) if parts[i].isdigit()]
        if not self.layer_lists:  # PEFT then takes any list, but not one at the root of the model
            return next((int(parts[i]) for i in numbered if i > 1), None)
        return next((int(parts[i]) for name in self.layer_lists for i in numbered if parts[i - 1] == name), None)


def read_config(
    config: Mapping[str, Any], findings: Findings, *, modules: int, assume_converted: bool = False
) -> LoraConfig | None:
    """Check every field; return None where a value that matters cannot be read (then `findings` says so).

    `modules` is the number of adapted modules: together with the number of patterns it bounds the work.
    `assume_converted` is the caller's word that weights with a base-changing initialisation were converted on saving.
    """
    check_fields(config, FIELD_ROLES, REFUSALS, findings)
    _check_init(config.get("init_lora_weights", True), findings, assume_converted)
    return read_settings(config, findings, modules=modules, alpha="lora_alpha")


def read_settings(
    config: Mapping[str, Any], findings: Findings, *, modules: int, alpha: str, max_rank: int = MAX_RANK
) -> LoraConfig | None:
    """The values alone; `alpha` is the field that holds α. None where one of them cannot be read."""
    reader = _Reader(config, findings, max_rank)
    result = LoraConfig(
        r=reader.rank("r", config.get("r", 8)),
        alpha=reader.alpha(alpha, config.get(alpha, 8)),
        use_rslora=reader.flag("use_rslora"),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        lora_bias=reader.flag("lora_bias"),
        targets=reader.targets(),
        excluded=reader.excluded(),
        layers=reader.layers(),
        layer_lists=reader.layer_lists(),
        rank_pattern=reader.patterns("rank_pattern", reader.rank, modules),
        alpha_pattern=reader.patterns("alpha_pattern", reader.alpha, modules),
        base_name=reader.text("base_model_name_or_path") or "",
        base_revision=reader.text("revision"),
        task_type=reader.text("task_type"),
    )
    return result if reader.readable else None


def check_fields(
    config: Mapping[str, Any], roles: Mapping[str, FieldRole], refusals: Mapping[str, Refusal], findings: Findings
) -> None:
    """Add what is refused by name, and what has no role."""
    if "peft_type" not in config:
        findings.add("not_lora", "the config has no peft_type, expected LORA", "give a folder that PEFT saved")
    for name, value in config.items():
        if name not in roles:
            if value is not None:
                findings.add(
                    "unknown_field",
                    f"the config sets {name[:80]!r}, whose effect is not known here",
                    "remove the field if it changes nothing, or update adapterctl",
                )
            continue
        rule = refusals.get(name)
        if rule is not None and not any(type(value) is type(ok) and value == ok for ok in rule.accepted):
            findings.add(rule.code, f"{name} is {_short(value)}: {rule.reason}", rule.hint)


def _check_init(value: Any, findings: Findings, assume_converted: bool) -> None:
    name = value.lower() if isinstance(value, str) else ""  # PEFT reads most of them in any case
    if value is None or isinstance(value, bool) or name in _PLAIN_INITS:
        return
    if name.startswith(_MUTATING_INITS):
        if not assume_converted:
            findings.add(
                "unconverted_init",
                f"init_lora_weights is {_short(value)}: it changes the base weights, so B·A alone is not the adapter",
                "save with path_initial_model_for_weight_conversion; if that was done, register --assume-converted",
            )
        return
    findings.add(
        "unknown_init",
        f"init_lora_weights is {_short(value)}, which is not known here",
        "set it to true if the training left the base weights alone",
    )


class _Reader:
    """Reads one value at a time; what does not fit becomes a finding, and a stand-in lets the check go on."""

    def __init__(self, config: Mapping[str, Any], findings: Findings, max_rank: int) -> None:
        self.config, self.findings, self.readable = config, findings, True
        self.max_rank = max_rank

    def rank(self, field: str, value: Any) -> int:
        if type(value) is int and 1 <= value <= self.max_rank:
            return value
        self._fault("bad_rank", f"{field} is {_short(value)}, expected a whole number from 1 to {self.max_rank}")
        return 1

    def alpha(self, field: str, value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < abs(value) <= MAX_ALPHA:
            return float(value)
        self._fault("bad_alpha", f"{field} is {_short(value)}, expected a finite number, not 0, at most {MAX_ALPHA:g}")
        return 1.0

    def flag(self, field: str) -> bool:
        value = self.config.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        self._fault("bad_config", f"{field} is {_short(value)}, expected true or false")
        return False

    def text(self, field: str) -> str | None:
        value = self.config.get(field)
        if value is None or (isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()):
            return value
        self._fault("bad_config", f"{field} is {_short(value)}, expected printable text of at most {_MAX_TEXT} letters")
        return None

    def targets(self) -> frozenset[str] | None:
        value = self.config.get("target_modules")
        if isinstance(value, str) and value:
            # PEFT would run it as a regular expression. We never do: the tensors are checked by their keys and
            # shapes alone, and a merge writes the list of modules that it found.
            return None
        if value is None or value == "":
            self._fault("no_targets", "target_modules is empty: PEFT would guess from the architecture of the base")
            return None
        return self._names("target_modules", value)

    def excluded(self) -> frozenset[str]:
        value = self.config.get("exclude_modules")
        # As with targets, a text is a regular expression and is not run.
        return frozenset() if value is None or isinstance(value, str) else self._names("exclude_modules", value)

    def layers(self) -> frozenset[int] | None:
        value = self.config.get("layers_to_transform")
        if value is None or value == []:
            return None
        numbers = value if isinstance(value, list) else [value]
        if all(type(number) is int for number in numbers):
            return frozenset(numbers)
        self._fault("bad_config", f"layers_to_transform is {_short(value)}, expected layer numbers")
        return None

    def layer_lists(self) -> tuple[str, ...]:
        value = self.config.get("layers_pattern") or []
        names = (value,) if isinstance(value, str) else value
        if isinstance(names, (list, tuple)) and all(isinstance(n, str) and _LAYER_LIST.fullmatch(n) for n in names):
            return tuple(names)
        self._fault("bad_pattern", f"layers_pattern is {_short(value)}, expected names such as 'layers'")
        return ()

    def patterns(self, field: str, read: Callable[[str, Any], V], modules: int) -> tuple[Pattern[V], ...]:
        entries = self.config.get(field)
        if entries is None:
            return ()
        if not isinstance(entries, dict):
            self._fault("bad_config", f"{field} is {_short(entries)}, expected a mapping")
            return ()
        plain = [key for key in entries if _PLAIN_KEY.fullmatch(key)]
        parts = len(plain) + sum(key.count(".") for key in plain)
        regexes = len(entries) - len(plain)
        if parts * modules > MAX_PLAIN_COMPARISONS or regexes * modules > MAX_REGEX_COMPARISONS:
            self._fault("too_many_patterns", f"{field} has {len(entries):,} entries for {modules:,} modules")
            return ()
        found = [(self._matcher(field, key), read(f"{field}[{key[:80]!r}]", entries[key])) for key in entries]
        return tuple(Pattern(matches, value) for matches, value in found if matches is not None)

    def _matcher(self, field: str, key: str) -> Callable[[str], bool] | None:
        if len(key) <= MAX_PATTERN_LENGTH and _PLAIN_KEY.fullmatch(key):
            return _plain_matcher(key)
        matcher = _regex_matcher(key) if len(key) <= MAX_PATTERN_LENGTH and _COMMON_REGEX.fullmatch(key) else None
        if matcher is None:
            self._fault(
                "bad_pattern",
                f"{field} has the key {key[:80]!r}, which is no module name and no simple regular expression",
                "write module names instead; look-around, back references and flags are not accepted",
            )
        return matcher

    def _names(self, field: str, value: Any) -> frozenset[str]:
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return frozenset(value)
        self._fault("bad_config", f"{field} is {_short(value)}, expected a list of module names")
        return frozenset()

    def _fault(self, code: str, message: str, hint: str = "") -> None:
        self.readable = False
        self.findings.add(code, message, hint)


def _plain_matcher(key: str) -> Callable[[str], bool]:
    """PEFT's `re.match(rf"(.*\\.)?({key})$", name)` for a key without operators, in which a dot is any character."""
    parts, at = [], 0
    for part in key.split("."):
        if part:
            parts.append((at, part))
        at += len(part) + 1

    def matches(name: str) -> bool:
        start = len(name) - len(key)
        if start < 0 or (start > 0 and name[start - 1] != "."):
            return False
        return all(name.startswith(part, start + at) for at, part in parts)

    return matches


def _regex_matcher(key: str) -> Callable[[str], bool] | None:
    # deferred: only a config with a real regular expression needs RE2, which answers in linear time
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(rf"(.*\.)?({key})$", options)
    except re2.error:
        return None
    if compiled.programsize > _MAX_REGEX_PROGRAM:
        return None
    return lambda name: compiled.match(name) is not None


def ends_in(module: str, names: frozenset[str]) -> bool:
    if not names:
        return False
    parts: Sequence[str] = module.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
