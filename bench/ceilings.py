"""The ceilings of the card, measured in the same run as everything else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.timing import time_graph

READ_BYTES = 4 << 30
PRODUCT_SIDE = 8192


@triton.jit
def _read(data, out, size, BLOCK: tl.constexpr):
    """Sums whole blocks, so that nothing but reading takes time."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        total += tl.load(data + start + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


@triton.jit
def _nothing(out):
    pass


def read_bandwidth() -> float:
    """Bytes per second of a pure read of device memory; without a GPU of PyTorch's sum, to try the benchmarks."""
    if not torch.cuda.is_available():
        data = torch.ones(16 << 20)
        return data.nbytes / (time_graph(data.sum, repeats=1, samples=3).median * 1e-6)
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    data = torch.randint(-5, 5, (READ_BYTES // 4,), dtype=torch.int32, device=device)
    out = torch.empty(processors * 4, dtype=torch.int32, device=device)
    best = min(
        time_graph(
            lambda block=block: _read[(processors * 4,)](data, out, data.numel(), BLOCK=block, num_warps=8),
            repeats=2,
            samples=10,
        ).median
        for block in (4096, 8192)
    )
    return READ_BYTES / (best * 1e-6)


def empty_kernel() -> float:
    """Microseconds of an empty kernel of one block per multiprocessor as a node of a graph."""
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    out = torch.empty(1, device="cuda")
    return time_graph(lambda: _nothing[(processors,)](out), repeats=200).median


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, a multiplication and an addition being two."""
    on_gpu = torch.cuda.is_available()
    side = PRODUCT_SIDE if on_gpu else 256
    left, right = (torch.randn(side, side, device="cuda" if on_gpu else "cpu").to(dtype) for _ in range(2))
    return 2 * side**3 / (time_graph(lambda: left @ right, repeats=5, samples=10).median * 1e-6)
