"""Attention over a prompt: by flash-attn where one is installed and runs, else by PyTorch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from fastspec import environment
from fastspec.ops.backends import Backend


class FlashAttention(NamedTuple):
    """A major version of flash-attn.

    Attributes:
        name: what ``fastspec info`` calls it.
        module: where its ``flash_attn_func`` is.
        least_capability: least major compute capability of the GPU.
        least_tokens: shorter prompts are left to others: it would take the host longer than it saves the GPU.
    """

    name: str
    module: str
    least_capability: int
    least_tokens: int


#: The most preferred first. All take ``[B, T, heads, head_dim]``; the fourth returns a tuple. Its front end, in
#: Python, takes the host some 150 µs per call, so at 640 tokens the GPU would wait for it in every layer.
FLASH = (
    FlashAttention("flash-attn 4", "flash_attn.cute", 9, 2048),
    FlashAttention("flash-attn 3", "flash_attn_interface", 9, 256),
    FlashAttention("flash-attn 2", "flash_attn", 8, 256),
)
SDPA = "PyTorch"


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention of each token to itself and those before it; grouped heads where there are fewer keys.

    A flash-attn that imports and then fails is not tried again for such heads; a warning says why.
    ``FASTSPEC_BACKEND=reference`` leaves all of them out.

    Args:
        queries: ``[B, T, heads, head_dim]``.
        keys, values: ``[B, T, kv_heads, head_dim]``.
        scale: factor on the scores.

    Returns:
        ``[B, T, heads, head_dim]`` in the dtype of the queries.
    """
    if environment.backend() != "reference":
        choices = flash_choices(queries.device, queries.dtype, queries.shape[-1])
        for flash in [flash for flash in choices if queries.shape[1] >= flash.least_tokens]:
            try:
                mixed = _flash_function(flash.module)(queries, keys, values, softmax_scale=scale, causal=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # assertions, compilers' errors, missing kernels: each version its own
                choices.remove(flash)
                warnings.warn(
                    f"{flash.name} does not run here and is left out: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            return mixed[0] if isinstance(mixed, tuple) else mixed
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return mixed.transpose(1, 2)


@lru_cache
def flash_choices(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[FlashAttention]:
    """Those that may know such heads, the most preferred first; what is taken out of the list is not used."""
    if dtype not in (torch.bfloat16, torch.float16):
        return []
    capability = _major_capability(device)
    return [flash for flash in FLASH if capability >= flash.least_capability and _imports(flash.module)]


def attentions() -> list[Backend]:
    """All ways to compute a prompt's attention on the current GPU, the most preferred first."""
    found = []
    capability = _major_capability(torch.device("cuda")) if torch.cuda.is_available() else 0
    for flash in FLASH:
        try:
            _flash_function(flash.module)
            reason = f"{flash.module}, prompts of at least {flash.least_tokens} tokens in bfloat16 or float16"
        except ImportError as error:
            found.append(Backend(flash.name, False, str(error)))
            continue
        if capability < flash.least_capability:
            reason = f"needs a GPU of compute capability {flash.least_capability}.0 or more"
        found.append(Backend(flash.name, capability >= flash.least_capability, reason))
    return [*found, Backend(SDPA, True, "scaled_dot_product_attention, any device")]


def _major_capability(device: torch.device) -> int:
    """0 for what is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _imports(module: str) -> bool:
    try:
        _flash_function(module)
    except ImportError:
        return False
    return True


@lru_cache
def _flash_function(module: str) -> Callable:
    """Its ``flash_attn_func``.

    Raises:
        ImportError: if there is none; the message says why.
    """
    try:
        return importlib.import_module(module).flash_attn_func
    except AttributeError:  # another version under the same name
        raise ImportError(f"{module} has no flash_attn_func") from None
    except ImportError:
        raise
    except Exception as error:  # what a library built for another torch raises
        raise ImportError(f"{module} does not load: {type(error).__name__}: {error}") from error
