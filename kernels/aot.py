"""Compiles every Triton kernel ahead of time, without a GPU: ``python -m fastspec.kernels.aot``.

Prints registers, spilled bytes and shared memory for each kernel and architecture; exits with 1 on a spill.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia

from fastspec.kernels import prefill, propose, verify

ARCHITECTURES = (80, 90, 100)
SAMPLING = {
    "temperature": "*fp64",
    "top_k": "*i64",
    "top_p": "*fp64",
    "min_p": "*fp64",
    "repetition_penalty": "*fp64",
    "min_tokens": "*i64",
    "seed": "*i64",
    "eos_token_ids": "*i64",
    "seen": "*u8",
}
TREE = {"tokens": "*i64", "table": "*i32", "positions": "*i64"}
VERIFY = {
    "target_logits": "*bf16",
    "draft_logits": "*fp32",
    **TREE,
    **SAMPLING,
    "stats": "*fp64",
    "arrivals": "*i32",
    "path": "*i64",
    "num_accepted": "*i64",
    "next_token": "*i64",
    "invalid": "*i1",
    "target_stride": "i64",
    "tokens_stride": "i64",
    "num_rows": "i32",
    "vocab_size": "i32",
    "num_nodes": "i32",
    "num_inner": "i32",
    "max_depth": "i32",
}
PROPOSE = {
    "logits": "*bf16",
    "draft_logits": "*fp32",
    **TREE,
    **SAMPLING,
    "logits_stride": "i64",
    "tokens_stride": "i64",
    "num_rows": "i32",
    "num_inner": "i32",
    "first_inner": "i32",
    "level": "i32",
    "vocab_size": "i32",
    "row_vocab": "i32",
}
ADD_NORM = {"hidden": "*bf16", "update": "*bf16", "weight": "*bf16", "normed": "*bf16", "epsilon": "fp32"}
ROTATE = {**dict.fromkeys(("fused", "cos", "sin", "keys", "values"), "*bf16"), "capacity": "i32"}
GATE = {"gate_up": "*bf16", "gated": "*bf16"}


class Report(NamedTuple):
    """What the compiler says of one kernel; registers per thread, bytes otherwise."""

    name: str
    architecture: int
    registers: int
    spills: int
    shared: int


class Kernel(NamedTuple):
    """A kernel in one configuration."""

    source: ASTSource
    options: dict[str, object]


def kernels() -> dict[str, Kernel]:
    """The kernels in their default configurations: chains and trees."""
    found = {}
    for name, rule, nodes in (
        ("block", 1, 16),
        ("recursive_rejection", 2, 128),
        ("target_only", 3, 128),
        ("drafter_invariant", 4, 128),
    ):
        constants = {"RULE": rule, "NEEDS_DRAFT": rule < 3, "NODES": nodes, "BLOCK": verify.BLOCK_SIZE}
        found[f"verify/{name}"] = _kernel(verify.verify_kernel, verify.NUM_WARPS[rule], VERIFY, constants)
    for name, rule in (("sampled", 1), ("ranked", 3)):
        constants = {"RULE": rule, "BLOCK": propose.BLOCK_SIZE}
        found[f"propose/{name}"] = _kernel(propose.propose_kernel, propose.NUM_WARPS, PROPOSE, constants)
    # The 7B's sizes, and the largest that are supported.
    for name, size, block, has_update in (
        ("first_norm", 4096, 4096, False),
        ("add_norm", 4096, 4096, True),
        ("add_norm_padded", 5120, 8192, True),
        ("add_norm_large", 16384, 16384, True),
    ):
        constants = {"SIZE": size, "BLOCK": block, "HAS_UPDATE": has_update}
        warps = prefill.norm_warps(block)
        found[f"prefill/{name}"] = _kernel(prefill.add_norm_kernel, warps, ADD_NORM, constants)
    for name, heads, kv_heads, head_dim, pairs in (
        ("rotate", 32, 32, 128, 64),
        ("rotate_grouped", 28, 4, 128, 64),
        ("rotate_padded", 32, 32, 80, 64),
    ):
        constants = {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "PAIRS": pairs,
            "BLOCK": prefill.rotation_heads(pairs),
        }
        found[f"prefill/{name}"] = _kernel(
            prefill.rotate_kernel, prefill.NUM_WARPS, ROTATE, constants, enable_fp_fusion=False
        )
    constants = {"SIZE": 11008, "BLOCK": prefill.GATE_BLOCK}
    found["prefill/gate"] = _kernel(prefill.gate_kernel, prefill.NUM_WARPS, GATE, constants)
    return found


def _kernel(
    function, num_warps: int, arguments: dict[str, str], constants: dict[str, object], **options: object
) -> Kernel:
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return Kernel(
        ASTSource(fn=function, signature=signature, constexprs=values), {"num_warps": num_warps, **options}
    )


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Report]:
    """Compiles everything and reads the resources from the cubins' metadata."""
    reports = []
    for architecture in architectures:
        for name, (source, options) in kernels().items():
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            registers, spills = _resources(compiled.asm["cubin"])
            reports.append(Report(name, architecture, registers, spills, compiled.metadata.shared))
    return reports


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory, from the kernel's resource usage."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", text))
    local = max(int(count) for count in re.findall(r"(?:LOCAL|STACK):(\d+)", text))
    return registers, local


def main() -> int:
    """Prints the table."""
    worst = 0
    print(f"{'kernel':<30}{'sm':>5}{'registers':>11}{'spills':>8}{'shared':>8}")
    for report in compile_all():
        print(
            f"{report.name:<30}{report.architecture:>5}{report.registers:>11}{report.spills:>8}{report.shared:>8}"
        )
        worst = max(worst, report.spills)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
