"""Runs every kernel on small inputs, to be watched by NVIDIA's compute-sanitizer: ``python tests/sanitizer.py``.

Starts itself under memcheck, racecheck, initcheck and synccheck in turn and fails if one of them finds
something. ``--plant bounds`` hands a kernel an output buffer that is too small; with a build made with
``FASTSPEC_PLANT_RACE`` racecheck must fail as well. Both show that the job can.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86


def drive(plant: str | None) -> None:
    """Launches all kernels over rules, trees and parameters; results are not looked at here."""
    import torch
    from kernel_cases import random_case, raw_draft_logits

    from fastspec.ops import Proposer, Verifier
    from fastspec.verification import Rule

    for seed in range(24):
        case = random_case(seed, "cuda", vocabularies=(33, 2049, 4097), max_nodes=10, max_batch=2)
        if case.rule is Rule.TRAVERSAL and not case.tree.is_chain:
            continue
        batch, _, vocab_size = case.target_logits.shape
        for backend in ("cuda", "triton"):
            if backend == "triton" and seed % 6:
                continue
            shape = (case.tree, batch, vocab_size, case.rule, "cuda", backend)
            verifier, proposer = Verifier(*shape), Proposer(*shape)
            for level in range(case.tree.max_depth):
                raw = raw_draft_logits(case, seed, level, padded=True)
                proposer(raw, level, case.tokens, case.draft_logits, case.sampling, case.positions)
            for cluster_size in (None,) if backend == "triton" else (1, 4, 16):
                verifier._cluster_size = cluster_size
                if plant == "bounds" and backend == "cuda":
                    verifier._verdict = verifier._verdict._replace(
                        num_accepted=torch.zeros(0, device="cuda").long()
                    )
                verifier(case.target_logits, case.tokens, case.sampling, case.positions, case.draft_logits)
    torch.cuda.synchronize()


def main() -> int:
    """Runs the tools; returns the number of those that found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--plant", choices=["bounds"])
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.plant)
        return 0
    failures = 0
    for tool in arguments.tools:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
        if tool != "initcheck":
            command += ["--kernel-name", "kns=verify", "--kernel-name", "kns=propose"]
        command += [
            sys.executable,
            __file__,
            "--drive",
            *(["--plant", arguments.plant] if arguments.plant else []),
        ]
        # Every tensor gets an allocation of its own, so that a step beyond it is seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [
            line for line in (result.stdout + result.stderr).splitlines() if line.startswith("=========")
        ]
        print(
            f"{tool}: exit {result.returncode}: {lines[-1] if lines else (result.stderr or result.stdout)[-400:]}"
        )
        if result.returncode:
            print("\n".join(lines[:20]))
        failures += result.returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main())
