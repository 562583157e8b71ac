"""Read a file that someone wrote by hand and that is untrusted: YAML's safe loader, no key twice, its size limited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..domain.errors import InvalidInput, NotFound


def read_limited(path: Path, limit: int, *, hint: str, shown: str = "") -> bytes:
    """The bytes of a file. Raises `NotFound`, or `InvalidInput` for one that cannot be read or is too large."""
    shown = shown or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no file {shown}", hint=hint) from error
    except OSError as error:
        raise InvalidInput(f"{shown} cannot be read: {error.strerror}", hint=hint) from error
    if len(content) > limit:
        raise InvalidInput(f"{shown} is larger than {limit >> 20} MiB", hint=hint)
    return content


def parse_yaml(content: bytes, path: Path, *, hint: str) -> Any:
    """Texts, numbers, lists and mappings of a YAML file. Raises `InvalidInput` for what is more than that."""
    import yaml  # deferred: `ls` and `show` read no YAML

    class UniqueKeys(yaml.SafeLoader):
        """YAML itself lets the last of two equal keys win in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is used twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        # a subclass of the safe loader: it builds texts, numbers, lists and mappings only
        return UniqueKeys(content.decode("utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:  # the last: nested without end
        raise InvalidInput(f"{path} is not plain YAML: {error}", hint=hint) from error
