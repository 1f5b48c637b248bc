"""``python -m bench QUESTION``: measures, prints a table, writes a JSON and a plot."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

QUESTIONS = ("verify", "propose")


def main() -> None:
    """Runs one question, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("question", choices=[*QUESTIONS, "all"])
    parser.add_argument("--out", type=Path, help="folder for results instead of bench/results")
    parser.add_argument("--commit", help="recorded in the header where git is not at hand")
    parser.add_argument("--quick", action="store_true", help="fewer rows and samples")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the benchmarks need an NVIDIA GPU, and torch finds none")

    from bench.ceilings import read_bandwidth
    from bench.report import header, print_table, write

    head = header(read_bandwidth(), arguments.commit)
    print(head)
    for question in QUESTIONS if arguments.question == "all" else [arguments.question]:
        module = importlib.import_module(f"bench.{question}")
        rows = module.measure(head["read_bandwidth_tbs"] * 1e12, arguments.quick)
        print_table(rows, module.UNIT)
        path = write(question, head, rows, arguments.out)
        print(f"written: {path}")
        if hasattr(module, "plot"):
            module.plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
