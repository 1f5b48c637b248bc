"""What stands between the products of a prompt's layers: norms with the residual add, RoPE into the cache, the gate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from transformers.activations import ACT2FN

from fastspec.ops.backends import choose, current, triton_version

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
#: Elements of a row that the threads of one program can hold.
MAX_HIDDEN_SIZE = 16384
SILU = type(ACT2FN["silu"])


def choose_backend(dtype: torch.dtype, hidden_size: int, device: torch.device) -> str:
    """``"triton"`` or ``"reference"``, as ``FASTSPEC_BACKEND`` and the machine allow.

    ``"cuda"`` gets the Triton kernels too, where Triton can compile them: there are none in CUDA C++. Single and double
    precision keep PyTorch's operations.

    Raises:
        ValueError: for a backend that was asked for and cannot run here.
    """
    chosen = choose("auto", device, dtype in KERNEL_DTYPES and hidden_size <= MAX_HIDDEN_SIZE)
    if chosen == "cuda":
        return "triton" if _triton_compiles(device) else "reference"
    return chosen


@lru_cache
def _triton_compiles(device: torch.device) -> bool:
    """Whether Triton, which no one asked for by name, makes kernels here: it wants a C compiler, for example."""
    if triton_version() is None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    try:
        with current(device):
            gate(torch.zeros(1, 32, dtype=torch.bfloat16, device=device), ACT2FN["silu"], "triton")
    except Exception as error:  # whatever the compilers raise
        warnings.warn(f"prompts are read without the Triton kernels: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``[..., hidden]`` divided by its root mean square, in float32 or better, times the weight ``[hidden]``."""
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return weight * exact.to(hidden.dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of ``[..., heads, head_dim]`` by ``[..., 1, head_dim]`` tables."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def add_norm(
    hidden: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    backend: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds what a block computed to the residual stream and norms the sum.

    Args:
        hidden: ``[..., hidden]``, the residual stream, contiguous for the kernel.
        update: of the same shape, or None for nothing to add. It may be overwritten.
        weight: ``[hidden]``.
        epsilon: added to the mean square.
        backend: ``"reference"`` or ``"triton"``.

    Returns:
        The new residual stream and its norm, of the same shape and dtype.
    """
    if backend == "reference":
        hidden = hidden if update is None else hidden + update
        return hidden, rms_norm(hidden, weight, epsilon)
    from fastspec.kernels.prefill import add_norm_kernel, norm_warps

    normed = torch.empty_like(hidden)
    size = hidden.shape[-1]
    block = 1 << (size - 1).bit_length()
    add_norm_kernel[(hidden.numel() // size,)](
        hidden,
        hidden if update is None else update,
        weight,
        normed,
        epsilon,
        SIZE=size,
        BLOCK=block,
        HAS_UPDATE=update is not None,
        num_warps=norm_warps(block),
    )
    return hidden if update is None else update, normed


def rotate_prompt(
    fused: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    backend: str = "reference",
) -> torch.Tensor:
    """Turns queries and keys by RoPE and stores the keys and values of a prompt.

    Args:
        fused: ``[T, (heads + 2 * kv_heads) * head_dim]`` contiguous: queries, keys and values. It may be overwritten.
        cos, sin: ``[T, head_dim]`` of the same dtype, whose halves are equal.
        keys, values: ``[T, kv_heads, head_dim]``, written: one sequence's rows in one layer of the cache.
        backend: ``"reference"`` or ``"triton"``.

    Returns:
        The queries ``[T, heads, head_dim]``.

    Raises:
        ValueError: for a cache with fewer rows than the prompt has.
    """
    length, kv_heads, head_dim = keys.shape
    if fused.shape[0] != length or values.shape != keys.shape:
        raise ValueError(
            f"a prompt of {fused.shape[0]} tokens needs as many rows of keys and values, "
            f"got {length} and {values.shape[0]}"
        )
    split = fused.view(length, -1, head_dim)
    heads = split.shape[1] - 2 * kv_heads
    if backend == "reference":
        queries, new_keys, new_values = split.split((heads, kv_heads, kv_heads), dim=1)
        cos, sin = cos[:, None], sin[:, None]
        keys.copy_(rotate(new_keys, cos, sin))
        values.copy_(new_values)
        return rotate(queries, cos, sin)
    from fastspec.kernels.prefill import NUM_WARPS, rotate_kernel, rotation_heads

    pairs = 1 << (head_dim // 2 - 1).bit_length()
    block = rotation_heads(pairs)
    rotate_kernel[(length, -(-split.shape[1] // block))](
        fused,
        cos,
        sin,
        keys,
        values,
        keys.stride(1) // head_dim,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # else a product and the sum are rounded once, not as PyTorch does
    )
    return split[:, :heads]


def gate(gate_up: torch.Tensor, activation: Callable, backend: str = "reference") -> torch.Tensor:
    """The first half of each row ``[..., 2 * F]``, through the activation, times the second: ``[..., F]``.

    Activations other than SiLU take the reference, whatever the backend.
    """
    if backend == "reference" or type(activation) is not SILU:
        opening, passing = gate_up.chunk(2, dim=-1)
        return activation(opening) * passing
    from fastspec.kernels.prefill import GATE_BLOCK, NUM_WARPS, gate_kernel

    size = gate_up.shape[-1] // 2
    gated = gate_up.new_empty(*gate_up.shape[:-1], size)
    gate_kernel[(gated.numel() // size, -(-size // GATE_BLOCK))](
        gate_up, gated, SIZE=size, BLOCK=GATE_BLOCK, num_warps=NUM_WARPS
    )
    return gated
