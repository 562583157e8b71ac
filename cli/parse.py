"""What people type, as values: pairs, numbers, durations, weights. Raises `InvalidInput` that shows how to write it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import typer

from ..registry.domain.errors import InvalidInput
from ..registry.domain.refs import ParentRef, Ref, check_name, parse_parent, parse_ref

#: More than there are of anything, and what a database takes for a number.
EVERY = 2**31
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d|)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kmg])?(i)?b)?")
_KERNEL = re.compile(r"[1-9][0-9]{0,3}(?:x[1-9][0-9]{0,3}){0,2}")
_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32", "f64": "F64"}


def pairs(texts: Iterable[str], *, option: str) -> dict[str, str]:
    """`KEY=VALUE` texts; a key given twice is refused, for one of the values would be lost."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidInput(f"{option} {text!r} is not KEY=VALUE", hint=f"write {option} key=value")
        if key in found:
            raise InvalidInput(f"{option} gives {key!r} twice: {found[key]!r} and {value!r}", hint="keep one of them")
        found[key] = value
    return found


def stated_version(text: str) -> Ref:
    """For what cannot be undone, or stops others: a name alone is the newest version, which may be a minute old."""
    ref = parse_ref(text)
    if ref == Ref(ref.name):
        raise InvalidInput(
            f"{text!r} is an adapter, and not one of its versions",
            hint=f"write {ref.name}:vN; adapterctl ls {ref.name}",
        )
    return ref


def in_utf8(text: str) -> str:
    """For an option whose text is kept. Bytes that are no UTF-8 reach us as half characters, which nothing stores."""
    for place, char in enumerate(text, start=1):
        if "\ud800" <= char <= "\udfff":
            raise typer.BadParameter(f"it is not UTF-8 at its character {place}")
    return text


def metrics(texts: Iterable[str]) -> dict[str, float]:
    return {key: _number(value, f"--metric {key}") for key, value in pairs(texts, option="--metric").items()}


def options(texts: Iterable[str]) -> dict[str, float | int | str | bool]:
    """Options of a merge method: true and false, whole and other numbers, else text."""
    return {key: _scalar(value) for key, value in pairs(texts, option="--option").items()}


def duration_s(text: str | None) -> float | None:
    """`90`, `90s`, `5m`, `1.5h`, `30d` in seconds."""
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise InvalidInput(f"duration {text!r} is not understood", hint="write 90s, 5m or 1.5h")
    return float(match[1]) * _SECONDS[match[2]]


def size_bytes(text: str | None) -> int | None:
    """`20MB`, `1.5GB`, `512 KiB` or `1000000` in bytes; KB and its kin count in thousands."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip().lower())
    if not match or not float(match[1]):
        raise InvalidInput(f"size {text!r} is not understood", hint="write 20MB, 1.5GB or 800KiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** "bkmg".index(match[2] or "b"))


def into(given: str | None, name: str | None) -> str | None:
    """The adapter that a result becomes: by `--into`, or by `--name` as in `register`."""
    if given is not None and name is not None and given != name:
        raise InvalidInput(f"--into {given} and --name {name} are two names for one result", hint="leave --name out")
    chosen = name if given is None else given
    return check_name(chosen) if chosen is not None else None


def dtype(text: str | None) -> str | None:
    """The safetensors name of bf16, f16, f32 or f64."""
    if text is None:
        return None
    name = _DTYPES.get(text.lower())
    if name is None:
        raise InvalidInput(
            f"dtype {text!r} is not one of bf16, f16, f32, f64", hint="leave it out for the widest parent's"
        )
    return name


def kernel(name: str, text: str) -> tuple[int, ...]:
    """`3`, `3x3` or `1x3x3`: a number an axis."""
    if not _KERNEL.fullmatch(text):
        raise InvalidInput(
            f"kernel {text!r} of {name!r} is not understood",
            hint=f"write --kernel {name}=3x3, or {name}=3 in one dimension",
        )
    return tuple(map(int, text.split("x")))


def parents(texts: Sequence[str], weights: str | None) -> tuple[ParentRef, ...]:
    """Parents in the order given, weighted by `REF=W` or by one list for all, not by both."""
    found = tuple(map(parse_parent, texts))
    if weights is None:
        return found
    if any("=" in text for text in texts):
        raise InvalidInput("weights are given twice, by --weights and by REF=WEIGHT", hint="use one of the two")
    values = [_number(part, "--weights") for part in weights.split(",")]
    if len(values) != len(found):
        raise InvalidInput(
            f"--weights has {len(values)} numbers for {len(found)} parents", hint="or write translate:v3=0.6 chat:v5=1"
        )
    return tuple(replace(parent, weight=value) for parent, value in zip(found, values, strict=True))


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInput(f"{what} {text!r} is not a finite number", hint="write a number such as 0.31")
    return value


def _scalar(text: str) -> float | int | str | bool:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
