"""Runs every kernel on small inputs, to be watched by NVIDIA's compute-sanitizer: ``python tests/sanitizer.py``.

Starts itself under memcheck, racecheck, initcheck and synccheck, several at a time, and fails if one of them finds
something. ``--plant bounds`` hands a kernel an output buffer that is too small; with a build made with
``FASTSPEC_PLANT_RACE`` racecheck must fail as well. Both show that the job can.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernel_cases import Case

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
#: Beginnings of the names of our kernels' functions; initcheck looks at every kernel, as any may write what ours read.
KERNELS = ("verify", "propose", "pass", "commit", "compact")
#: Racecheck of CUDA 13.0 ends with an error of its own in the pass.
NOT_WATCHED = {"racecheck": ("pass",)}
FOUND = 86
#: Lines of a run's findings.
SHOWN = 20
#: Tools that watch a case or two at a time, each time in a process of its own: racecheck takes longer from launch to
#: launch.
PARTS = {"racecheck": 14}
#: Runs side by side.
WORKERS = max(4, 3 * (os.cpu_count() or 1) // 4)
SEEDS = 24
#: Racecheck follows every access to shared memory and takes many times as long as the others: chosen cases alone.
FEWER_SEEDS = {"racecheck": 0}


def chosen_cases(device: str) -> Iterator[tuple[int, Case]]:
    """Cases, numbered, that take every way through verification: rules, element types, few and many slices and rows."""
    import torch
    from kernel_cases import random_case

    from fastspec import DraftTree
    from fastspec.sampling import SamplingParams
    from fastspec.verification import Rule

    chain, long_chain = DraftTree.chain(5), DraftTree.chain(15)
    small, wider, tree = (DraftTree.kary(one) for one in ((3, 2, 1), (3, 2, 2), (4, 2, 2, 2)))
    plain, greedy = SamplingParams(), SamplingParams(temperature=0.0)
    cut, nucleus = SamplingParams(top_k=20, top_p=0.9), SamplingParams(top_p=0.9, min_p=0.01)
    penalised, flat = SamplingParams(repetition_penalty=1.3), SamplingParams(temperature=50.0, top_p=0.95)
    # The seeds are such that drafts are good: some are accepted to the end, some are rejected on the way.
    for seed, shape, rule, dtype, vocab_size, params in (
        (9, chain, Rule.BLOCK, torch.float32, 4097, (plain,)),
        (21, chain, Rule.BLOCK, torch.float32, 4097, (plain,)),
        (17, chain, Rule.TOKEN_LEVEL, torch.bfloat16, 33281, (plain, penalised)),
        (20, long_chain, Rule.BLOCK, torch.float16, 4097, (plain, cut, greedy)),
        (12, chain, Rule.BLOCK, torch.float32, 33281, (cut,)),
        (13, chain, Rule.TOKEN_LEVEL, torch.float32, 4097, (flat, cut)),
        (19, small, Rule.RECURSIVE_REJECTION, torch.float32, 4097, (plain, plain)),
        (12, small, Rule.RECURSIVE_REJECTION, torch.bfloat16, 33281, (plain, plain)),
        (15, small, Rule.TARGET_ONLY, torch.bfloat16, 33281, (greedy,)),
        (28, wider, Rule.RECURSIVE_REJECTION, torch.float32, 33281, (greedy, plain)),
        (4, tree, Rule.RECURSIVE_REJECTION, torch.float32, 4097, (plain, nucleus, greedy)),
        (1, tree, Rule.RECURSIVE_REJECTION, torch.bfloat16, 33281, (plain,)),
        (27, tree, Rule.TARGET_ONLY, torch.float32, 4097, (plain, cut)),
        (7, tree, Rule.DRAFTER_INVARIANT, torch.float16, 4097, (plain,)),
    ):
        options = {
            "vocabularies": (vocab_size,),
            "tree": shape,
            "rule": rule,
            "dtype": dtype,
            "params": params,
        }
        yield seed, random_case(seed, device, **options)


def drive(plant: str | None, seeds: int, part: int, parts: int) -> None:
    """Launches all kernels over rules, trees and parameters, or a part of them; results are not looked at here."""
    import torch
    from kernel_cases import random_case, raw_draft_logits

    from fastspec.ops import Proposer, Verifier
    from fastspec.verification import Rule

    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    shapes = {"vocabularies": (33, 2049, 4097), "max_nodes": 10, "max_batch": 2}
    drawn_cases = ((seed, random_case(seed, "cuda", **shapes)) for seed in range(seeds))
    for number, (seed, case) in enumerate(itertools.chain(chosen_cases("cuda"), drawn_cases)):
        if number % parts != part or (case.rule is Rule.TRAVERSAL and not case.tree.is_chain):
            continue
        batch, _, vocab_size = case.target_logits.shape
        for backend in ("cuda", "triton"):
            if backend == "triton" and number % 6:
                continue
            shape = (case.tree, batch, vocab_size, case.rule, "cuda", backend)
            verifier, proposer = Verifier(*shape), Proposer(*shape)
            for group_size in (None,) if backend == "triton" else (1, 4, min(63, processors // batch)):
                verifier._group_size = group_size
                if plant == "bounds" and backend == "cuda":
                    verifier._verdict = verifier._verdict._replace(
                        num_accepted=torch.zeros(0, device="cuda").long()
                    )
                verifier(case.target_logits, case.tokens, case.sampling, case.positions, case.draft_logits)
            for level in range(case.tree.max_depth):
                raw = raw_draft_logits(case, seed, level, padded=True)
                proposer(raw, level, case.tokens, case.draft_logits, case.sampling, case.positions)
    if part == 0:
        drive_prefill()
        drive_pass()
    torch.cuda.synchronize()


def drive_prefill() -> None:
    """What stands between the products of a prompt's layers, at even and odd sizes."""
    import torch
    from transformers.activations import ACT2FN

    from fastspec.ops.prefill import add_norm, gate, rotate_prompt

    def ones(*shape):
        return torch.ones(shape, device="cuda", dtype=torch.bfloat16)

    for rows, size, heads, kv_heads, head_dim in (
        (1, 64, 4, 2, 64),
        (17, 1030, 7, 1, 128),
        (5, 96, 4, 4, 80),
    ):
        hidden, weight = ones(rows, size), ones(size)
        add_norm(hidden, None, weight, 1e-5, "triton")
        add_norm(hidden, ones(rows, size), weight, 1e-5, "triton")
        gate(ones(rows, 2 * size), ACT2FN["silu"], "triton")
        fused, tables = ones(rows, (heads + 2 * kv_heads) * head_dim), ones(rows, head_dim)
        keys, values = (ones(kv_heads, rows, head_dim).transpose(0, 1) for _ in range(2))
        rotate_prompt(fused, tables, tables, keys, values, "triton")


def drive_pass() -> None:
    """Passes and commitments of a small model, over chains and a tree, from empty and filled caches."""
    import torch
    from models import tiny_llama
    from transformers import LlamaForCausalLM

    from fastspec import DraftTree
    from fastspec.model.transformer import DecodeTransformer
    from fastspec.ops.commit import Committer
    from fastspec.ops.fused_pass import FusedPass
    from fastspec.ops.verify import Verdict
    from fastspec.sampling import SamplingParams
    from fastspec.state import DecodeState

    model: LlamaForCausalLM = tiny_llama(
        1003, 256, intermediate_size=640, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    ).to("cuda", torch.bfloat16)
    transformer = DecodeTransformer(model.model, model.lm_head)
    for tree, batch in ((DraftTree.chain(0), 1), (DraftTree.chain(4), 3), (DraftTree.kary((3, 2, 1)), 2)):
        state = DecodeState(batch, 60, tree, 1003, "cuda")
        cache = transformer.new_cache(batch, 60 + tree.num_nodes)
        run = FusedPass(transformer, cache, tree.num_nodes, tree.on("cuda").mask)
        committer = Committer(state, cache)
        for row in range(batch):
            prompt = torch.arange(3, device="cuda")
            state.admit(row, prompt, 60, SamplingParams(), SamplingParams(), row, (2,))
        state.tree_tokens[:, 1:] = 7
        for prefix in (0, 1, 17, 50):
            state.num_tokens.fill_(prefix + 1)
            run(state.tree_tokens, state.num_tokens - 1)
            verdict = Verdict(
                tree.on("cuda").paths[-1:].expand(batch, -1).contiguous(),
                torch.full((batch,), tree.max_depth, device="cuda"),
                torch.full((batch,), 9, device="cuda"),
                torch.zeros(batch, dtype=torch.bool, device="cuda"),
            )
            committer(verdict)


def run_tool(name: str, command: list[str]) -> int:
    """Runs one tool, and shows what it finds as it comes; returns its exit status."""
    others = collections.deque(maxlen=5)
    last, num_shown = "", 0
    # Every tensor gets an allocation of its own, so that a step beyond it is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, **streams) as process:
        for line in map(str.rstrip, process.stdout):
            if not line.startswith("========="):
                others.append(line)
                continue
            last = line
            if num_shown < SHOWN:
                print(f"{name}: {line}", flush=True)
            num_shown += 1
    print(f"{name}: exit {process.returncode}: {last or ' '.join(others)}", flush=True)
    return process.returncode


def main() -> int:
    """Runs the tools; returns the number of runs that found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--kernels", nargs="*", default=KERNELS, choices=KERNELS)
    parser.add_argument("--plant", choices=["bounds"])
    parser.add_argument(
        "--drive", nargs=3, type=int, metavar=("SEEDS", "PART", "PARTS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.drive is not None:
        drive(arguments.plant, *arguments.drive)
        return 0
    runs = []
    for tool in arguments.tools:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
        if tool != "initcheck":
            watched = [kernel for kernel in arguments.kernels if kernel not in NOT_WATCHED.get(tool, ())]
            command += [word for kernel in watched for word in ("--kernel-name", f"kns={kernel}")]
        command += [sys.executable, __file__, *(["--plant", arguments.plant] if arguments.plant else [])]
        parts = PARTS.get(tool, 1)
        for part in range(parts):
            work = ["--drive", *map(str, (FEWER_SEEDS.get(tool, SEEDS), part, parts))]
            runs.append((tool if parts == 1 else f"{tool} {part + 1}/{parts}", command + work))
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return sum(status != 0 for status in pool.map(run_tool, *zip(*runs, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
