"""How fast ``fastspec train-draft`` goes at true sizes: ``python -m bench.training --steps 400``.

A draft from scratch learns the language of a planted target (:mod:`bench.planted`) from texts sampled from its law.
The course of its expected acceptance is measured against that target, which is loaded from disk as a user's would be.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

import torch

from bench.ceilings import product_rate, read_bandwidth
from bench.law import PROBABILITIES, PlantedLaw
from bench.planted import planted_law, planted_processor, planted_target
from bench.report import header, write
from bench.shapes import TARGETS
from fastspec.training.train import Training, train_draft

#: Tokens that the paper's companion pre-trains its draft on (2403.00858).
RECIPE_TOKENS = 600e9
DOCUMENT = 512
SIZES = {"llava7b": "115m", "small": "128,1,2,256"}


def main(arguments: list[str] | None = None) -> None:
    """Trains and writes ``<out or bench/results>/<gpu>/training.json``."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=list(TARGETS), default="llava7b")
    parser.add_argument("--loss", default="cross-entropy", help="any other has the target in the loop")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--documents", type=int, default=20_000, help=f"of {DOCUMENT} tokens")
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument(
        "--work", type=Path, help="folder for the target and the texts; a temporary one unless given"
    )
    parser.add_argument("--out", type=Path, help="folder for results instead of bench/results")
    parser.add_argument("--commit", help="recorded in the header where git is not at hand")
    given = parser.parse_args(arguments)
    if given.target == "llava7b" and not torch.cuda.is_available():
        parser.error(
            "true sizes need an NVIDIA GPU, and torch finds none; --target small can be tried without one"
        )
    if given.work is None:
        with tempfile.TemporaryDirectory() as work:
            _run(given, Path(work))
    else:
        _run(given, given.work)


def _run(given: argparse.Namespace, work: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    law = planted_law(given.target)
    _write_target(given.target, law, work / "target", device)
    _write_texts(law, work / "texts.txt", given.documents)
    peak = product_rate(torch.bfloat16 if device == "cuda" else torch.float32)
    result = train_draft(
        Training(
            target=str(work / "target"),
            out=work / "draft",
            stage="pretrain",
            data=(work / "texts.txt",),
            size=SIZES[given.target],
            loss=given.loss,
            steps=given.steps,
            batch_size=given.batch_size,
            max_length=given.length,
            held_out=2 * given.batch_size,
            evaluate_every=given.evaluate_every,
            save_every=given.steps,
            workers=2,
            device=device,
        )
    )
    with (work / "draft.run" / "losses.csv").open() as file:
        course = [
            {"step": int(row["step"]), "expected_acceptance": float(row["expected_acceptance"])}
            for row in csv.DictReader(file)
            if row["expected_acceptance"]
        ]
    rate = result["tokens_per_second"]
    row = {
        "name": f"{SIZES[given.target]} for {given.target}, {given.loss}",
        "parameters": result["parameters"],
        "steps": result["steps"],
        "tokens_per_step": given.batch_size * given.length,
        "tokens_per_second": round(rate),
        "tflops": round(result["operations_per_second"] / 1e12, 2),
        "share_of_product_rate": round(result["operations_per_second"] / peak, 3),
        "peak_memory_gib": round((result["peak_memory_bytes"] or 0) / 2**30, 2),
        "hours_for_the_recipe": round(RECIPE_TOKENS / rate / 3600),
        "acceptance": course,
    }
    head = header(read_bandwidth(), given.commit) | {"product_rate_tflops": round(peak / 1e12, 1)}
    path = write(
        "training" if given.target == "llava7b" else f"training-{given.target}", head, [row], given.out
    )
    print(json.dumps(row, indent=1))
    print(f"written: {path}")


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
    with path.open("w") as file:
        for row in torch.stack(tokens, 1).tolist():
            file.write(" ".join(f"t{token}" for token in row) + "\n\n")


if __name__ == "__main__":
    main()
