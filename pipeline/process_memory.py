"""Memory that a process frees is kept for its next step.

Surprising: on the CPU every activation comes from the C library, and glibc gives large ones back to
the kernel and asks for them again at every step: 400 MB of zeroed pages for iTPN-B in bfloat16, 1
GB in float32 through oneDNN (benchmarks/results/2026-11-model.md).
"""

from __future__ import annotations

import ctypes

# Numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_ARENA_BYTES = 64 << 20
"""Size of what glibc hands to threads at a time; with as much padding it keeps empty ones, too."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the rest of its life.

    Its size then stays at its peak. GPU memory is torch's own affair.

    Returns:
        Whether the C library could be told; others than glibc cannot, and nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: _ARENA_BYTES}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
