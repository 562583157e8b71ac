"""An adapter that comes over the wire: `multipart/form-data`, written to a folder as it arrives, in constant memory.

Only named parts are taken: `about`, and the files of an adapter. The names of files that a client gives are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from ..domain.errors import InvalidInput, Problem, Unavailable, raise_all

ABOUT = "about"
ABOUT_BYTES = 1 << 20
#: Every file that is taken, and its largest size; the weights may be as large as the whole upload.
RECEIVED_PARTS = {"adapter_config.json": 1 << 20, "adapter_model.safetensors": None, "README.md": 1 << 20}
_HINT = "send the parts about, adapter_config.json, adapter_model.safetensors and, where there is one, README.md"


async def receive(request: Request, folder: Path, *, limit: int) -> bytes:
    """Write the files of the request into `folder`; returns what it says about them (JSON)."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise InvalidInput("the upload is not multipart/form-data with a boundary", hint=_HINT)
    parts = _Parts(folder, limit)
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            # the disk may be slow: other requests go on meanwhile
            await run_in_threadpool(parser.write, chunk)
        parser.finalize()
    except MultipartParseError as error:
        raise InvalidInput(f"the upload cannot be read: {error}", hint=_HINT) from error
    except OSError as error:
        raise Unavailable(f"the upload cannot be stored: {error.strerror}", hint="free space on the server") from error
    finally:
        parts.close()
    return parts.about()


class _Parts:
    """What the parser calls: begin, data and end of each header and each part."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._about = bytearray()
        self._seen: list[str] = []
        self._header: list[bytes] = [b"", b""]
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._left = 0
        self._file: BinaryIO | None = None
        self._ended = False

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": lambda data, start, end: self._write(data[start:end]),
            "on_part_end": self.close,
            "on_end": self._end,
        }

    def about(self) -> bytes:
        """Raises `InvalidInput` where a part is missing."""
        missing = [name for name in (ABOUT, *list(RECEIVED_PARTS)[:2]) if name not in self._seen]
        problems = [Problem("missing_part", f"there is no part {name}") for name in missing]
        if not self._ended:
            problems.append(Problem("cut", "the upload ended before its last boundary"))
        raise_all(InvalidInput, "the upload is not an adapter:", problems, hint=_HINT)
        return bytes(self._about)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._headers = {}
        self._header = [b"", b""]

    def _add_header(self, half: int, data: bytes) -> None:
        self._header[half] += data
        if len(self._header[half]) > 1000:
            raise InvalidInput("a part of the upload has a header of more than 1000 bytes", hint=_HINT)

    def _end_header(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode(errors="replace")
        if name != ABOUT and name not in RECEIVED_PARTS:
            raise InvalidInput(f"the upload has a part {name[:80]!r}", hint=_HINT)
        if name in self._seen:
            raise InvalidInput(f"the upload has the part {name} twice", hint=_HINT)
        self._seen.append(name)
        self._name = name
        self._left = ABOUT_BYTES if name == ABOUT else RECEIVED_PARTS[name] or self._limit
        self._file = None if name == ABOUT else (self._folder / name).open("xb")

    def _write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise InvalidInput(f"the part {self._name} is too large", hint="see max_upload_mb in docs/settings.md")
        if self._file is None:
            self._about += data
        else:
            self._file.write(data)

    def _end(self) -> None:
        self._ended = True
