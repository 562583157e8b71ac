"""JSON of our facts and views, and back: one rule for tables, files, the child process and `-o json`."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from .domain.errors import Corrupt

T = TypeVar("T")


def to_builtins(value: Any) -> Any:
    """Dicts, lists, strings and numbers only; dataclass fields keep their order and names."""
    return msgspec.to_builtins(value)


def from_builtins(value: Any, kind: type[T]) -> T:
    """The fact that `to_builtins` turned into plain values. Raises `Corrupt` where it does not fit."""
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        raise Corrupt(f"stored {kind.__name__} cannot be read: {error}") from error


def to_json(value: Any) -> str:
    """Compact JSON of a fact or view."""
    return msgspec.json.encode(value).decode()


def from_json(text: str | bytes, kind: type[T]) -> T:
    """Read what `to_json` wrote. Raises `Corrupt` with the path of the first thing that does not fit."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise Corrupt(f"stored {kind.__name__} cannot be read: {error}") from error
