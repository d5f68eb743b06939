"""Linear layers through oneDNN, on the processors where torch's own way is slow.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on AMD processors. On those with
AVX-512 oneDNN, which is part of torch, too, is twice as fast in the same precision
(benchmarks/results/2026-11-model.md).

Surprising: the class of layers is changed in place. Copies of a model take it along; state dicts
know nothing of it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

_LEAST_MULTIPLY_ADDS = 25_000_000
"""Of a product; smaller ones lose by what calling oneDNN costs, at one thread or two."""


class OneDnnLinear(nn.Linear):
    """`nn.Linear` with float32 products by oneDNN, where they are large."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        if not _suits(input, self.weight):
            return super().forward(input)
        product = torch.ops.aten.mkldnn_linear(input.to_mkldnn(), self.weight, self.bias)
        return product.to_dense()


def _suits(input: Tensor, weight: Tensor) -> bool:
    return (
        input.numel() * weight.shape[0] >= _LEAST_MULTIPLY_ADDS
        and input.ndim > 1
        and input.is_cpu
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def use_onednn(*modules: nn.Module | None) -> None:
    """Have the linear layers of models use oneDNN; None is passed over."""
    for root in modules:
        for module in root.modules() if root is not None else ():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear


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
