"""Markdown: tables, and paragraphs wrapped as the project's pages are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 120


def table(head: Sequence[str], body: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text and whose others are numbers."""
    align = "|---" * text_columns + "|---:" * (len(head) - text_columns) + "|"
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *body))
    return "\n".join([first, align, *others])


def wrap(page: str) -> str:
    """The page with its paragraphs and list items wrapped; headings, tables, pictures and code stay as they are."""
    blocks = page.strip().split("\n\n")
    return "\n\n".join(_wrap_block(block.strip("\n")) for block in blocks) + "\n"


def _wrap_block(block: str) -> str:
    if block.startswith(("#", "|", "!", "```")):
        return block
    if block.startswith("- "):
        items = ("\n" + block).split("\n- ")[1:]
        return "\n".join(_fill(item, "- ", "  ") for item in items)
    return _fill(block)


def _fill(text: str, first: str = "", indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
