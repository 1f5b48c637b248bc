"""Fused weights that share their storage with the transformers modules they came from."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

#: Two threads that packed the same layer at a time would each read a copy, and its parameters be views of one.
_packing = threading.Lock()


class LayerWeights(NamedTuple):
    """One decoder layer. Matrices are ``[out, in]``; biases are None where the model has none."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


def pack_layer(layer: nn.Module) -> LayerWeights:
    """Fuses the projections of a LLaMA-shaped layer; the layer's own parameters become views of the result.

    Packing again finds the storage already fused and copies nothing.

    Raises:
        ValueError: if a projection is not a plain ``nn.Linear`` with weights in memory, or a norm no RMSNorm.
    """
    attention, mlp = layer.self_attn, layer.mlp
    check_norms(layer.input_layernorm, layer.post_attention_layernorm)
    qkv, qkv_bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
    output, output_bias = fuse([attention.o_proj])
    gate_up, gate_up_bias = fuse([mlp.gate_proj, mlp.up_proj])
    down, down_bias = fuse([mlp.down_proj])
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.data,
        qkv=qkv,
        qkv_bias=qkv_bias,
        output=output,
        output_bias=output_bias,
        post_norm=layer.post_attention_layernorm.weight.data,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def fuse(linears: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stacks linear layers over their outputs into one storage and points the layers' parameters at it."""
    for linear in linears:
        check_plain(linear, nn.Linear, "projections")
        if linear.weight.device.type == "meta":
            raise ValueError("expected weights in memory, got a model on the meta device (offloaded?)")
    with _packing:
        weight = _stack([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        if all(bias is None for bias in biases):
            return weight, None
        if any(bias is None for bias in biases):
            raise ValueError("expected all of the fused projections to have a bias, or none of them")
        return weight, _stack(biases)


def check_plain(module: nn.Module, kind: type[nn.Module], what: str) -> None:
    """Raises ValueError for a module that may compute more than its weights say: only they are read."""
    if type(module) is not kind:
        raise ValueError(
            f"expected plain nn.{kind.__name__} {what}, got {type(module).__name__}: "
            "merge adapters and load the model unquantised"
        )


def check_norms(*norms: nn.Module) -> None:
    """Raises ValueError for a norm that is no RMSNorm by name; every family has a class of its own."""
    for norm in norms:
        if not type(norm).__name__.endswith("RMSNorm"):
            raise ValueError(f"expected an RMSNorm, got {type(norm).__name__}: merge adapters")


def _stack(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    first = parameters[0].data
    rows = sum(parameter.shape[0] for parameter in parameters)
    if _adjacent(parameters):
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    # Else a model first used in inference mode could never be trained again.
    with torch.inference_mode(False):
        stacked = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, stacked.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return stacked


def _adjacent(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the parameters already lie one after the other in one storage, row-major."""
    storage = parameters[0].untyped_storage().data_ptr()
    expected = parameters[0].storage_offset()
    for parameter in parameters:
        in_place = parameter.untyped_storage().data_ptr() == storage and parameter.is_contiguous()
        if not in_place or parameter.storage_offset() != expected:
            return False
        expected += parameter.numel()
    return True
