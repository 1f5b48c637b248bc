"""Runs the study: trains the drafts that are missing, evaluates all, writes the record, the page and its figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

import bench.compact
from bench.study.claims import example_name
from bench.study.drafts import COUNTED_PICTURES, compact_drafts, coverage, image_drafts
from bench.study.figure import draw_bars, draw_example
from bench.study.measure import measure, parts, runs_of
from bench.study.page import BARS, DOCS, PAGE, RECORD, write_page
from bench.study.record import make_record, write_record
from fastspec import miniature
from fastspec.miniature.models import count_parameters

MAX_NEW_TOKENS = 128


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the journals and results")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts of each task")
    parser.add_argument(
        "--image-minutes", type=float, default=10.0, help="time to train the image draft, if it is missing"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two prompts and untrained adapters: does it run?"
    )
    parser.add_argument("--publish", action="store_true", help="write the record and the page into docs/")
    options = parser.parse_args(arguments)
    if options.prompts < 2:
        parser.error(f"--prompts must be at least 2, for intervals over prompts, got {options.prompts}")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    notes = Console(stderr=True, highlight=False)
    prompts, max_new_tokens = (2, 24) if options.quick else (options.prompts, MAX_NEW_TOKENS)
    length = ["--steps", "2"] if options.quick else ["--minutes", str(options.image_minutes)]

    folder = image_drafts(options.out, length)
    compact = compact_drafts(options.out, 3 if options.quick else COUNTED_PICTURES)
    study = parts(
        {name: f"miniature:{name}" for name in miniature.DRAFTS} | {"image": str(folder / "draft-image")},
        {"twin": str(folder / "draft-twin")},
        {"ft": "miniature:ft"} | {name: str(path) for name, path in compact.items()},
    )
    results = {part.name: measure(part, options.out, prompts, max_new_tokens, notes) for part in study}
    greedy = runs_of(study[0], options.out)
    header = {
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "image_training": _image_training(folder),
        "compact": {
            name: {
                "vocabulary": json.loads((path / "shrinking.json").read_text())["result"]["vocabulary"],
                "held_out_coverage": round(coverage(path, greedy), 5),
            }
            for name, path in compact.items()
        },
        "compact_115m": _large_drafts(options.quick),
    }
    record = make_record(header, study, results, options.out)
    places = [options.out, *([DOCS] if options.publish else [])]
    for place in places:
        write_record(record, place / RECORD)
        (place / PAGE).write_text(write_page(record), "utf-8")
        draw_bars(record, place / BARS)
        for example in record["examples"]:
            draw_example(example, place / example_name(example["task"]))
    print(f"written: {', '.join(str(place / PAGE) for place in places)}")


def _large_drafts(quick: bool) -> list[dict]:
    """What compact copies of a draft of true size save on this machine."""
    rows = bench.compact.measure(
        bench.compact.variants("small" if quick else "115m", "cpu"), "cpu", 0.0, quick
    )
    names = ("megabytes_per_pass", "share_of_full")
    return [{"name": row["name"].partition("/")[2]} | {name: row[name] for name in names} for row in rows]


def _image_training(folder: Path) -> dict:
    """How the image draft was made."""
    facts = json.loads((folder / "training.json").read_text())["image"]
    draft = LlavaForConditionalGeneration.from_pretrained(folder / "draft-image")
    names = ("device", "answers", "steps", "adapter_steps", "twin_steps")
    return {name: facts[name] for name in names} | {
        "adapter": count_parameters(draft.model.multi_modal_projector)
    }


if __name__ == "__main__":
    main()
