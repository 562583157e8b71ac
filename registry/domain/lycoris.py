"""LoHa and LoKr adapters as PEFT saves them: which tensors make up a module, and of what shape its delta is.

They are not kept here but converted: the delta of either has an exact form as B·A, which `merging/lycoris.py` makes.
As in `adapter.py`, a file is accepted only when every tensor and every field is accounted for, and no tensor is read.

Sources: Hyeon-Woo, Ye-Bin & Oh 2022, https://arxiv.org/abs/2108.06098 (LoHa); Yeh et al. 2024,
https://arxiv.org/abs/2309.14859 (LoKr); layouts and names as in PEFT 0.21, `peft/tuners/{loha,lokr}/layer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .adapter import CONVERTIBLE, Tensors, tensors_by_module
from .conversion import Kernel, Method
from .errors import InvalidAdapter, InvalidInput, Problem, raise_all
from .header import Header, TensorEntry
from .lora_config import REFUSALS, FieldRole, Findings, LoraConfig, check_fields, ends_in, read_settings

#: A rank that no factor has stands for whole factors in LyCORIS, as in `r=100000`; it divides α all the same.
MAX_NOMINAL_RANK = 1_000_000
#: Rows or columns of a delta. Two factors of a small file have a product of any size.
MAX_FEATURES = 1 << 22

_ROLES: Mapping[str, FieldRole] = {
    "r": "respected",
    "alpha": "respected",
    "rank_pattern": "respected",
    "alpha_pattern": "respected",
    "target_modules": "derived",
    "exclude_modules": "derived",
    "layers_to_transform": "derived",
    "layers_pattern": "derived",
    "use_effective_conv2d": "derived",
    "base_model_name_or_path": "recorded",
    "revision": "recorded",
    "task_type": "recorded",
    "auto_mapping": "recorded",
    "peft_version": "recorded",
    "rank_dropout": "training",
    "module_dropout": "training",
    "init_weights": "training",  # every start, "lycoris" too, leaves the base alone
    "inference_mode": "training",
    "peft_type": "refused",
    "modules_to_save": "refused",
}
#: Every field of PEFT's LoHaConfig and LoKrConfig, as `FIELD_ROLES` has those of LoraConfig.
LYCORIS_ROLES: Mapping[Method, Mapping[str, FieldRole]] = {
    "loha": _ROLES,
    "lokr": {
        **_ROLES,
        "decompose_both": "derived",
        "decompose_factor": "derived",
        "rank_dropout_scale": "training",
    },
}
_REFUSALS = {"modules_to_save": REFUSALS["modules_to_save"]}
_METHODS: Mapping[str, Method] = dict(zip(CONVERTIBLE, ("loha", "lokr"), strict=True))
_PLACE = r"base_model\.model\.(?P<module>.+?)\.{}(?:\.(?P<name>[^.]+))?"
_KEYS: Mapping[Method, re.Pattern[str]] = {
    "loha": re.compile(_PLACE.format(r"hada_(?P<slot>w[12]_[ab]|t[12])")),
    "lokr": re.compile(_PLACE.format(r"lokr_(?P<slot>w[12](?:_[ab])?|t2)")),
}

#: The axes of each tensor of a module, of which r is the rank; those of one letter are of one length. o and i are the
#: rows and columns of the delta, or a·b and c·d where it is a Kronecker product; k, h and w are a kernel.
_Layout = Mapping[str, str]
_LOHA = (
    {"w1_a": "or", "w1_b": "ri", "w2_a": "or", "w2_b": "ri"},
    {"w1_a": "ro", "w1_b": "ri", "t1": "rrhw", "w2_a": "ro", "w2_b": "ri", "t2": "rrhw"},
)
_LOKR = tuple(
    {**one, **two}
    for one in ({"w1": "ac"}, {"w1_a": "ar", "w1_b": "rc"})
    for two in (
        {"w2": "bd"},
        {"w2": "bdk"},
        {"w2": "bdhw"},
        {"w2_a": "br", "w2_b": "rd"},
        {"w2_a": "rb", "w2_b": "rd", "t2": "rrhw"},
    )
)
_LAYOUTS: Mapping[Method, Sequence[_Layout]] = {"loha": _LOHA, "lokr": _LOKR}
#: Tensors that PEFT only makes, and finds in a file, where this field is true.
_ASKED_FOR: Mapping[Method, Mapping[str, str]] = {
    "loha": {"t1": "use_effective_conv2d"},
    "lokr": {"w1_a": "decompose_both", "t2": "use_effective_conv2d"},
}


@dataclass(frozen=True, slots=True)
class LycorisModule:
    """One adapted module; `tensors` by their short names (`w1_a`, `t2`, ...).

    Its delta is `scaling` times a (d_out, prod(in_shape)) matrix; `in_shape` is (d_in,) for a linear layer and
    (channels, kernel...) for a convolution. `w2_leads` tells the one layout in which PEFT puts W2 first: rows are
    (row of W2, row of W1), columns (channel of W2, column of W1, kernel).
    """

    name: str
    scaling: float
    tensors: Mapping[str, TensorEntry]
    d_out: int
    in_shape: tuple[int, ...]
    w2_leads: bool = False


@dataclass(frozen=True, slots=True)
class LycorisFacts:
    """What the files of an adapter say. `modules` is sorted by name; `config` is the JSON as it was read."""

    method: Method
    modules: tuple[LycorisModule, ...]
    r: int
    base_name: str
    base_revision: str | None
    task_type: str | None
    config: Mapping[str, Any]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Safetensors dtype names in use, sorted."""
        return tuple(sorted({entry.dtype for module in self.modules for entry in module.tensors.values()}))


def read_lycoris(
    config: Mapping[str, Any], header: Header, kernels: Mapping[str, Kernel] | None = None
) -> LycorisFacts:
    """What the two files say together, or `InvalidAdapter` with everything that is wrong with them.

    `kernels` gives the kernel of convolutions by their name or its end, for most files do not tell a convolution from a
    linear layer. Raises `InvalidInput` for one that names no module, or is none.
    """
    _check_kernels(kernels or {})
    method = _method(config)
    findings = Findings()
    check_fields(config, LYCORIS_ROLES[method], _REFUSALS, findings)
    found = tensors_by_module(header, findings, read=_reader(method), unknown=_add_unknown)
    settings = read_settings(config, findings, modules=len(found), alpha="alpha", max_rank=MAX_NOMINAL_RANK)
    modules = [
        _module(name, found[name], method, settings, _kernel_of(name, kernels or {}), config, findings)
        for name in sorted(found)
    ]
    raise_all(InvalidAdapter, "the adapter cannot be converted", findings.problems())
    assert settings is not None  # what could not be read is a finding
    _check_used(kernels or {}, sorted(found))
    return LycorisFacts(
        method=method,
        modules=tuple(module for module in modules if module is not None),
        r=settings.r,
        base_name=settings.base_name,
        base_revision=settings.base_revision,
        task_type=settings.task_type,
        config=dict(config),
    )


def _method(config: Mapping[str, Any]) -> Method:
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _METHODS:
        return _METHODS[kind]
    message = f"peft_type is {str(kind)[:80]!r}, expected {' or '.join(CONVERTIBLE)}"
    hint = "LoRA is registered as it is; no other kind is converted"
    raise InvalidAdapter(message, hint=hint, problems=[Problem("not_convertible", message, hint)])


def _reader(method: Method) -> Callable[[str], tuple[str, str, str] | None]:
    def read(key: str) -> tuple[str, str, str] | None:
        match = _KEYS[method].fullmatch(key)
        return (match["module"], match["slot"], match["name"] or "") if match else None

    return read


def _add_unknown(entry: TensorEntry, findings: Findings) -> None:
    hint = "only tensors of the method that the config names are accepted: others would be lost"
    findings.add("unknown_tensors", f"{entry.key} is not a tensor of this adapter", hint)


def _kernel_of(name: str, kernels: Mapping[str, Kernel]) -> Kernel | None:
    return next((kernel for key, kernel in kernels.items() if ends_in(name, frozenset({key}))), None)


def _check_kernels(kernels: Mapping[str, Kernel]) -> None:
    for key, kernel in kernels.items():
        if not 1 <= len(kernel) <= 3 or any(axis < 1 for axis in kernel):
            raise InvalidInput(
                f"{kernel!r} is no kernel of {key!r}", hint="give one to three numbers from 1, such as (3, 3)"
            )


def _check_used(kernels: Mapping[str, Kernel], modules: Sequence[str]) -> None:
    unused = [key for key in kernels if not any(ends_in(name, frozenset({key})) for name in modules)]
    if unused:
        shown = ", ".join(modules[:4]) + (", ..." if len(modules) > 4 else "")
        raise InvalidInput(
            f"a kernel is given for {unused[0]!r}, with which no module's name ends", hint=f"the modules are {shown}"
        )


def _module(
    name: str,
    tensors: Tensors,
    method: Method,
    settings: LoraConfig | None,
    kernel: Kernel | None,
    config: Mapping[str, Any],
    findings: Findings,
) -> LycorisModule | None:
    """One module, or None with the reason added to `findings`."""
    layout = _layout(name, tensors, method, findings)
    if layout is None or settings is None:
        return None
    if not settings.is_targeted(name):
        findings.add("not_targeted", f"{name} is adapted, but the config does not target it: PEFT would ignore it")
    for slot, flag in _ASKED_FOR[method].items():
        if slot in tensors and config.get(flag) is not True:
            findings.add("unexpected_tensors", f"{name} has a {slot}, though the config does not set {flag}")
    lengths = _lengths(name, tensors, layout, settings.rank(name), findings)
    if lengths is None:
        return None
    d_out = lengths["o"] if method == "loha" else lengths["a"] * lengths["b"]
    d_in = lengths["i"] if method == "loha" else lengths["c"] * lengths["d"]
    in_shape = _in_shape(name, d_in, tensors, lengths, kernel, findings)
    if in_shape is None:
        return None
    if max(d_out, prod(in_shape)) > MAX_FEATURES:
        findings.add("too_large", f"{name} has {d_out:,} rows and {prod(in_shape):,} columns, at most {MAX_FEATURES:,}")
    return LycorisModule(name, settings.scaling(name), tensors, d_out, in_shape, w2_leads="k" in lengths)


def _layout(name: str, tensors: Tensors, method: Method, findings: Findings) -> _Layout | None:
    """The layout that has these tensors; of several, the one with their numbers of axes, where there is one."""
    alike = [layout for layout in _LAYOUTS[method] if layout.keys() == tensors.keys()]
    if alike:
        axes = {slot: len(entry.shape) for slot, entry in tensors.items()}
        return next((one for one in alike if {slot: len(one[slot]) for slot in one} == axes), alike[0])
    known = sorted({", ".join(layout) for layout in _LAYOUTS[method]})
    findings.add(
        "incomplete_module",
        f"{name} has {', '.join(sorted(tensors))}, expected {' or '.join(known)}",
        "save the adapter again; gather sharded weights first",
    )
    return None


def _lengths(name: str, tensors: Tensors, layout: _Layout, rank: int, findings: Findings) -> Mapping[str, int] | None:
    """The length of each axis, or None where two tensors do not agree on one, or one and the config on the rank."""
    lengths = {"r": rank}
    for slot, axes in layout.items():
        shape = tensors[slot].shape
        if len(shape) != len(axes):
            findings.add("shape_mismatch", f"{name}: {slot} is {list(shape)}, expected {len(axes)} axes")
            return None
        for axis, length in zip(axes, shape, strict=True):
            expected = lengths.setdefault(axis, length)
            if length == expected:
                continue
            if axis == "r":
                findings.add("rank_mismatch", f"{name}: {slot} is {list(shape)}, the config says rank {rank}")
            else:
                findings.add("shape_mismatch", f"{name}: {slot} is {list(shape)}, expected {expected} for {length}")
            return None
    return lengths


def _in_shape(
    name: str, d_in: int, tensors: Tensors, lengths: Mapping[str, int], given: Kernel | None, findings: Findings
) -> tuple[int, ...] | None:
    """Channels and kernel of a convolution, or the width of a linear layer; None where that cannot be told."""
    told = _told_kernels(tensors, lengths)
    if not told:  # a matrix: only the caller knows of a kernel, by which its columns are counted too
        window = prod(given or ())
        if d_in % window:
            findings.add(
                "shape_mismatch", f"{name} has {d_in:,} columns, which a kernel of {_short(given)} does not divide"
            )
            return None
        return (d_in // window, *(given or ()))
    if given is None and len(told) > 1:
        findings.add(
            "kernel_unknown",
            f"{name} may be a convolution in one dimension or in two: the file says {_short(told[-1])}",
            f"say which: --kernel {name}={' or '.join(_short(kernel) for kernel in told)}",
        )
        return None
    if given is not None and given not in told:
        expected = " or ".join(_short(kernel) for kernel in told if kernel) or "none: it is a linear layer"
        findings.add("shape_mismatch", f"{name} is said to have a kernel of {_short(given)}, expected {expected}")
        return None
    return (d_in, *(given or told[0]))


def _told_kernels(tensors: Tensors, lengths: Mapping[str, int]) -> Sequence[Kernel]:
    """The kernels that the shapes leave possible, () for a linear layer; nothing where they tell none.

    PEFT gives the core tensor of a one-dimensional convolution a second axis of length 1. It never writes the whole W2
    of a convolution as a matrix.
    """
    if "k" in lengths:
        return [(lengths["k"],)]
    if "h" in lengths:
        kernel = (lengths["h"], lengths["w"])
        return [kernel] if kernel[1] > 1 or "w2" in tensors else [kernel[:1], kernel]
    return [()] if "w2" in tensors else []


def _short(kernel: Kernel | None) -> str:
    return "x".join(map(str, kernel or ()))
