"""Train the miniature: `python -m fastspec.miniature.train --out DIR`.

The whole run fits the minutes it is given: the learning rate decays by elapsed time. With `--steps` every
stage runs that many steps instead. A stage needs what the stages before it left in the folder.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import time
from pathlib import Path

# torch is imported inside: worker processes import this module too, and need none of it.

STAGES = ("tokenizer", "target", "base", "chat", "ft", "score")
EXTRA_STAGES = ("image",)  # only when asked for
PACKS = {
    "target.tar": ("target",),
    "drafts.tar": (
        *("draft-base", "draft-chat", "draft-ft", "draft-image", "draft-twin"),
        *("README.md", "training.json"),
    ),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastspec.miniature.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="time for all the stages together (default 6.5)")
    length.add_argument("--steps", type=int, help="steps per stage, instead of a time")
    parser.add_argument(
        "--stage",
        default=",".join(STAGES),
        help=f"stages to run, with commas (default {','.join(STAGES)}); there is also {','.join(EXTRA_STAGES)}",
    )
    parser.add_argument(
        "--batch", type=int, help="rows per step of the target (default 128 on cuda, 8 on cpu)"
    )
    parser.add_argument(
        "--draft-batch", type=int, help="rows per step of a draft (default 512 on cuda, 32 on cpu)"
    )
    parser.add_argument("--rate", type=float, help="peak learning rate, instead of each stage's own")
    parser.add_argument("--workers", type=int, help="processes that make data (default: all but two cores on cuda, "
                        "0 on cpu)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--scenes", type=int, default=512, help="held-out scenes per task in the scores")
    parser.add_argument("--answer-tokens", type=int, default=220, help="longest answer when scoring")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="train the target further from the weights in the folder; with another --seed it sees other scenes",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the target's two towers")
    parser.add_argument("--pack", type=Path, help="folder that also gets target.tar and drafts.tar")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack(out: Path, folder: Path) -> None:
    """The weights as two archives, to be unpacked inside the weights' folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in PACKS.items():
        fresh = folder / f".{name}.new"
        with tarfile.open(fresh, "w") as archive:
            for member in members:
                if (out / member).exists():
                    archive.add(out / member, arcname=member)
        fresh.replace(folder / name)


def main(arguments: list[str] | None = None) -> None:
    begin = time.monotonic()
    options = parser().parse_args(arguments)
    names = [name.strip() for name in options.stage.split(",")]
    known = (*STAGES, *EXTRA_STAGES)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown stage {unknown[0]!r}; expected some of {', '.join(known)}")

    import torch

    from .stages import Run, run_stages

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(
        out=options.out.resolve(),
        device=device,
        seed=options.seed,
        batch=options.batch or (128 if cuda else 8),
        draft_batch=options.draft_batch or (512 if cuda else 32),
        workers=options.workers if options.workers is not None else (max(1, _cores() - 2) if cuda else 0),
        steps=options.steps,
        rate=options.rate,
        scenes=options.scenes,
        answer_tokens=options.answer_tokens,
        compile=options.compile,
        resume=options.resume,
    )
    run.out.mkdir(parents=True, exist_ok=True)
    minutes = None if options.steps is not None else options.minutes or 6.5
    run_stages(run, sorted(names, key=known.index), minutes, begin)
    if options.pack:
        pack(run.out, options.pack)
    print(f"done in {time.monotonic() - begin:.0f} s: {run.out}")


if __name__ == "__main__":
    main()
