"""Float32 matrix products through oneDNN, on the processors where torch's own way is slow.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on AMD processors. On those with
AVX-512 oneDNN, which is part of torch, too, is twice as fast (benchmarks/results/2026-11-model.md).

Surprising: torch asks oneDNN only where the precision is "medium", that is, where it may round to
bfloat16. oneDNN makes use of that only on processors with AMX and computes in float32 on others.
So the permission is given where products are seen to keep every digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def use_onednn() -> bool:
    """Have this process multiply float32 matrices by oneDNN, if that gains and rounds nothing.

    It is a setting of the process, that of `torch.set_float32_matmul_precision`. Which way products
    go depends on the processor alone, so that a resumed run goes the same.

    Returns:
        Whether they go through oneDNN now.
    """
    if not processor_gains():
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if is_exact(torch.matmul):
        return True
    torch.set_float32_matmul_precision(before)
    return False


def is_exact(matmul: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether products with the unit matrix are the other matrix, to the last bit of float32."""
    for size in (64, 512):
        matrices = torch.linspace(1, 2, 3 * size * size).view(3, size, size)  # 24 bits in use
        for a in (matrices, matrices.mT, matrices[0]):
            unit = torch.eye(size).expand_as(a)
            if not (torch.equal(matmul(a, unit), a) and torch.equal(matmul(unit, a), a)):
                return False
    return True


def processor_gains() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has MKL and oneDNN."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "AuthenticAMD"
    )


def _vendor() -> str:
    """As the processor calls it; empty where nobody tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""
