"""What numpy computes with: its BLAS, held to one thread, and what of it decides the last bits of a result."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_info


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each product be computed by the thread that asks for it: bytes do not depend on the number of threads."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


def keep_freed_memory() -> None:
    """Let arrays that come and go with each module reuse memory instead of asking the kernel for it every time.

    glibc adapts to the largest block that was freed (mallopt(3), M_MMAP_THRESHOLD): freeing one of 4 MiB halves the
    CPU time of `cat`, which otherwise goes into 30,000 page faults. Elsewhere this line does nothing.
    """
    bytearray(4 << 20)


def computed_with() -> dict[str, Any]:
    """What decides the last bits of a result, whatever is computed."""
    blas: Mapping[str, Any] = next((entry for entry in threadpool_info() if entry.get("user_api") == "blas"), {})
    return {
        "numpy": np.__version__,
        "blas": f"{blas.get('internal_api', 'unknown')} {blas.get('version', '')}".strip(),
        "blas_kernel": blas.get("architecture", "unknown"),
        "cpu": _cpu_model(),
        "machine": platform.machine(),
        "device": "cpu",
    }


@cache
def _libraries() -> ThreadpoolController:
    """The BLAS that numpy computes with; looking for it among all loaded libraries costs more than a small merge."""
    return ThreadpoolController()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
