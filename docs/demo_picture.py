"""Runs the demo and keeps what it shows for the README, demo.png and demo.svg: ``make picture``."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from fastspec.demo import run_demo

DOCS = Path(__file__).parent
COLUMNS = 96


def main() -> None:
    """Writes the drawn picture and, as an SVG, everything that the terminal shows."""
    logging.disable_progress_bar()
    os.chdir(DOCS)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text.assemble(("$ ", "bold cyan"), "make demo"))
    run_demo(
        None,
        None,
        gamma=5,
        temperature=0.0,
        max_new_tokens=160,
        seed=36,
        device="cpu",
        save=Path("demo.png"),
        console=console,
    )
    svg = console.export_svg(title="fastspec demo")
    # A reader of the README should not fetch fonts from a third party.
    Path("demo.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL))
    print(f"written: {DOCS / 'demo.png'}, {DOCS / 'demo.svg'}")


if __name__ == "__main__":
    main()
