"""How fast ``fastspec train-draft`` goes at true sizes: ``python -m bench.training --minutes 4``.

A draft from scratch learns the language of a planted target (:mod:`bench.planted`) from texts sampled from its law.
The course of its expected acceptance is measured against that target, which is loaded from disk as a user's would be.
``python -m bench.training --plot FILE`` draws a result that is on record.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.ceilings import product_rate, read_bandwidth
from bench.law import PROBABILITIES, PlantedLaw
from bench.planted import planted_law, planted_processor, planted_target
from bench.report import header, write
from bench.shapes import TARGETS
from fastspec.training.sizes import DraftSize, parse_size
from fastspec.training.train import Training, train_draft

#: Tokens that the paper's companion pre-trains its draft on (2403.00858).
RECIPE_TOKENS = 600e9
DOCUMENT = 512
SIZES = {"llava7b": "115m", "small": "128,1,2,256"}
#: Share of a large product's rate that a training is expected to reach; the steps are planned by it.
PLANNED_SHARE = 0.4
#: Seconds for loading the target, and for the last evaluation and saving.
LOADING, ENDING = 25, 20
EVALUATIONS = 12
#: Without a second step there is no rate.
LEAST_STEPS = 3


class Deadline(TrainerCallback):
    """Ends a training at a time.

    Args:
        end: as :func:`time.monotonic` tells it.
    """

    def __init__(self, end: float):
        self._end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self._end and state.global_step >= LEAST_STEPS:
            control.should_training_stop = True


def main(arguments: list[str] | None = None) -> None:
    """Trains and writes ``<out or bench/results>/<gpu>/training.json``, with its plot where matplotlib is."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=list(TARGETS), default="llava7b")
    parser.add_argument("--loss", default="cross-entropy", help="any other has the target in the loop")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="for everything, set-up and saving included"
    )
    parser.add_argument("--steps", type=int, help="as many as are expected to fit unless given")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--documents", type=int, default=40_000, help=f"of {DOCUMENT} tokens")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument(
        "--work", type=Path, help="folder for the target and the texts; a temporary one unless given"
    )
    parser.add_argument("--out", type=Path, help="folder for results instead of bench/results")
    parser.add_argument("--commit", help="recorded in the header where git is not at hand")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this result, and do nothing else")
    given = parser.parse_args(arguments)
    if given.plot is not None:
        print(f"written: {plot(given.plot)}")
        return
    if given.target == "llava7b" and not torch.cuda.is_available():
        parser.error(
            "true sizes need an NVIDIA GPU, and torch finds none; --target small can be tried without one"
        )
    end = begin + 60 * given.minutes - ENDING
    if given.work is None:
        with tempfile.TemporaryDirectory() as work:
            _run(given, Path(work), end)
    else:
        _run(given, given.work, end)


def _run(given: argparse.Namespace, work: Path, end: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    law, size = planted_law(given.target), parse_size(SIZES[given.target])
    peak = product_rate(torch.bfloat16 if device == "cuda" else torch.float32)
    _write_target(given.target, law, work / "target", device)
    _write_texts(law, work / "texts.txt", given.documents)
    tokens_per_step = given.batch_size * given.length
    steps = given.steps
    if steps is None:
        seconds = end - time.monotonic() - LOADING
        operations = 6 * num_multiplied(size, law.vocab_size) * tokens_per_step
        steps = max(EVALUATIONS, int(seconds * PLANNED_SHARE * peak / operations))
    result = train_draft(
        Training(
            target=str(work / "target"),
            out=work / "draft",
            stage="pretrain",
            data=(work / "texts.txt",),
            size=SIZES[given.target],
            loss=given.loss,
            steps=steps,
            batch_size=given.batch_size,
            max_length=given.length,
            held_out=given.batch_size,
            evaluate_every=max(1, steps // EVALUATIONS),
            save_every=2 * steps,  # the draft is saved at the end, and nobody resumes
            workers=2,
            device=device,
            compile=given.compile,
        ),
        [Deadline(end)],
    )
    with (work / "draft.run" / "losses.csv").open() as file:
        course = [
            {"step": int(row["step"]), "expected_acceptance": float(row["expected_acceptance"])}
            for row in csv.DictReader(file)
            if row["expected_acceptance"]
        ]
    rate = result["tokens_per_second"]
    row = {
        "name": f"{SIZES[given.target]} for {given.target}, {given.loss}" + ", compiled" * given.compile,
        "parameters": result["parameters"],
        "steps": result["steps"],
        "planned_steps": steps,
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": round(rate),
        "tflops": round(result["operations_per_second"] / 1e12, 2),
        "share_of_product_rate": round(result["operations_per_second"] / peak, 3),
        "peak_memory_gib": round((result["peak_memory_bytes"] or 0) / 2**30, 2),
        "hours_for_the_recipe": round(RECIPE_TOKENS / rate / 3600),
        "acceptance": course,
    }
    head = header(read_bandwidth(), given.commit) | {"product_rate_tflops": float(f"{peak / 1e12:.4g}")}
    question = "training" if given.target == "llava7b" else f"training-{given.target}"
    path = write(question + "-compiled" * given.compile, head, [row], given.out)
    print(json.dumps(row, indent=1))
    print(f"written: {path}")
    try:
        print(f"written: {plot(path)}")
    except ImportError:
        print("plot left out: matplotlib is not installed (the extra 'bench' brings it)")


def num_multiplied(size: DraftSize, vocab_size: int) -> int:
    """Weights that every token is multiplied by."""
    layer = 4 * size.hidden**2 + 3 * size.hidden * size.ffn
    return size.layers * layer + vocab_size * size.hidden


def plot(path: Path) -> Path:
    """Draws the expected acceptance of a result over the tokens that were learned from, beside its file.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    results = json.loads(path.read_text())
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for row in results["rows"]:
        points = [
            (one["step"] * row["tokens_per_step"] / 1e6, one["expected_acceptance"])
            for one in row["acceptance"]
        ]
        axes.plot(*zip(*points, strict=True), marker=".", label=row["name"])
    rates = ", ".join(f"{row['tokens_per_second']:,} tokens/s" for row in results["rows"])
    axes.set(xlabel="million tokens", ylabel="expected acceptance Σ min(p, q)", ylim=(0, 1))
    axes.set_title(f"{results['header']['gpu']}: {rates}", fontsize=10)
    axes.legend(loc="lower right")
    drawn = path.with_suffix(".svg")
    figure.savefig(drawn)
    return drawn


def _write_target(name: str, law: PlantedLaw, folder: Path, device: str) -> None:
    if (folder / "config.json").is_file():
        return
    target = planted_target(name, law, device, torch.bfloat16)
    planted_processor(target.config).save_pretrained(folder)
    target.save_pretrained(folder)


def _write_texts(law: PlantedLaw, path: Path, documents: int) -> None:
    """Documents sampled from the target's law, one a line, a blank line between them."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor(PROBABILITIES)
    successors = law.successors[:, : len(PROBABILITIES)]
    tokens = [successors[torch.randint(len(successors), (documents,), generator=generator), 0]]
    for _ in range(DOCUMENT - 1):
        drawn = torch.multinomial(chances, documents, replacement=True, generator=generator)
        tokens.append(successors[law.class_of[tokens[-1]], drawn])
    names = [f"t{token}" for token in range(law.vocab_size)]
    with path.open("w") as file:
        for row in torch.stack(tokens, 1).tolist():
            file.write(" ".join([names[token] for token in row]) + "\n\n")


if __name__ == "__main__":
    main()
