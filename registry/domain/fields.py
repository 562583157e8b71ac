"""Reading a mapping that someone wrote by hand: known keys only, typed, every problem told and not only the first.

Files of ours are data and never code; what reads them here takes what a safe YAML loader gave, and opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import Problem


class Fields:
    """Typed reading of one mapping that notes what is wrong and goes on with a value of the right type.

    `where` is the path of the mapping, `inside` says that paths of its keys begin with it; `of` names the whole.
    """

    def __init__(
        self, value: Any, where: str, known: Sequence[str], problems: list[Problem], *, of: str, inside: bool = False
    ) -> None:
        self._problems, self._prefix = problems, f"{where}." if inside else ""
        self._readable = isinstance(value, dict)
        self._value: Mapping[Any, Any] = value if self._readable else {}
        if not self._readable:
            problems.append(Problem(where, f"is {kind_of(value)}, expected keys and values"))
        for key in self._value:
            if key not in known:
                self.problem(str(key), f"is no key of {of}", hint=f"known here: {', '.join(known)}")

    def problem(self, key: str, message: str, hint: str = "") -> None:
        self._problems.append(Problem(self._prefix + key, message, hint))

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self._value.get(key, default)
        # True is an int to Python and not to anyone else
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        self.problem(key, f"is {kind_of(value)}, expected {_NAMES[kind]}")
        return kind() if default is None else default

    def text(self, key: str, default: str | None = None, *, pattern: str = r"(?s).+") -> str:
        if default is None and key not in self._value:
            if self._readable:
                self.problem(key, "is missing")
            return ""
        value: str = self.get(key, str, default)
        if not re.fullmatch(pattern, value):
            self.problem(key, f"is {value!r}, expected some text" if value == "" else f"{value!r} is not allowed")
        return value

    def texts(self, key: str, default: list[str]) -> list[str]:
        values: list[Any] = self.get(key, list, default)
        if all(isinstance(value, str) for value in values):
            return values
        self.problem(key, "is no list of texts")
        return default

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value: int = self.get(key, int, default)
        if not low <= value <= high:
            self.problem(key, f"is {value}, expected {low} to {high}")
        return value


_NAMES = {str: "a text", int: "a whole number", list: "a list"}


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "empty"
    return _NAMES.get(type(value), f"a {type(value).__name__}") if not isinstance(value, dict) else "a mapping"
