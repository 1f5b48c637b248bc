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

from fastspec.kernels import propose, verify

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
    num_warps: int


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
    return found


def _kernel(function, num_warps: int, arguments: dict[str, str], constants: dict[str, object]) -> Kernel:
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return Kernel(ASTSource(fn=function, signature=signature, constexprs=values), num_warps)


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Report]:
    """Compiles everything and reads the resources from the cubins' metadata."""
    reports = []
    for architecture in architectures:
        for name, (source, num_warps) in kernels().items():
            compiled = triton.compile(
                source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps}
            )
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
