"""``python -m bench QUESTION ...``: measures, prints a table, writes a JSON and a plot."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from bench.shapes import DRAFTS, TARGETS

#: Each question, with its module; `pass` is no name for one.
QUESTIONS = {
    "verify": "verify",
    "propose": "propose",
    "pass": "passes",
    "draft": "draft",
    "linear": "linear",
    "attention": "attention",
    "prefill": "prefill",
    "cycle": "cycle",
    "exact": "exact",
}
#: What is made of kernels for a GPU alone.
GPU_ONLY = ("verify", "propose", "all")


def main(arguments: list[str] | None = None) -> None:
    """Runs some questions, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("questions", nargs="+", choices=[*QUESTIONS, "all"])
    parser.add_argument("--target", choices=list(TARGETS), default="llava7b")
    parser.add_argument(
        "--draft", choices=list(DRAFTS), default="", help="the target's usual one unless given"
    )
    parser.add_argument("--out", type=Path, help="folder for results instead of bench/results")
    parser.add_argument("--commit", help="recorded in the header where git is not at hand")
    parser.add_argument("--quick", action="store_true", help="fewer rows and samples")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and (
        given.target == "llava7b" or not set(GPU_ONLY).isdisjoint(given.questions)
    ):
        parser.error(
            "the benchmarks need an NVIDIA GPU, and torch finds none; without one only "
            f"{', '.join(name for name in QUESTIONS if name not in GPU_ONLY)} can be tried, with --target small"
        )

    from bench.ceilings import read_bandwidth
    from bench.report import header, print_table, write
    from bench.setup import Setup

    bandwidth = read_bandwidth()
    head = header(bandwidth, given.commit)
    print(head)
    setup = Setup(bandwidth, given.quick, given.target, given.draft)
    for question in QUESTIONS if "all" in given.questions else given.questions:
        module = importlib.import_module(f"bench.{QUESTIONS[question]}")
        rows = module.measure(setup)
        small = "" if given.target == "llava7b" else f"-{given.target}"
        path = write(question + small, head, rows, given.out)  # first: printing may fail
        print_table(rows)
        print(f"written: {path}")
        if hasattr(module, "plot"):
            module.plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
