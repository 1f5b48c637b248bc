"""The study's pictures: the bar chart in the manner of the paper's, and answers with the draft's misses."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.study.measure import GAMMAS
from fastspec import miniature
from fastspec.report import error_bars

MEASURES = (
    ("tau", "block efficiency"),
    ("mbsu", "memory-bound speed-up"),
    ("ratio", "token rate, plain = 1"),
)
COLOURS = {"base": "#b8c4d0", "chat": "#7fa3c7", "ft": "#2f6aa8", "image": "#d08a2e"}
#: Of the examples: pixels per character, per line, and of the picture.
ADVANCE, LINE, SIDE, MARGIN, COLUMNS = 7.8, 40, 144, 16, 84
FORESEEN, MISSED = "#d9f2d9", "#f6c9c4"


def draw_bars(record: dict[str, Any], path: Path) -> None:
    """Bars by task and draft, a row for each measure, a column for each γ: greedy decoding with chains.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["part"] == "greedy" and row["draft"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    width = 0.8 / len(COLOURS)
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(GAMMAS), sharey="row", squeeze=False)
    for (measure, title), line in zip(MEASURES, grid, strict=True):
        line[0].set_ylabel(title)
        for gamma, axes in zip(GAMMAS, line, strict=True):
            for place, (draft, colour) in enumerate(COLOURS.items()):
                chosen = [row for row in rows if (row["draft"], row["shape"]) == (draft, f"chain {gamma}")]
                values = [row[measure] for row in chosen]
                axes.bar(
                    [index + (place - 1.5) * width for index in range(len(tasks))],
                    values,
                    width,
                    yerr=error_bars(values, [row.get(f"{measure}_interval") for row in chosen]),
                    color=colour,
                    error_kw={"linewidth": 0.8},
                    label=draft,
                )
            axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
            axes.set_xticks(range(len(tasks)), tasks)
            if measure == MEASURES[0][0]:
                axes.set_title(f"γ = {gamma}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    # Text stays text, and the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        figure.savefig(path, metadata={"Date": None})


def draw_example(example: dict[str, Any], path: Path) -> None:
    """An answer beside its picture: green where the draft foresaw the token, else red with the draft's guess below."""
    left = MARGIN + SIDE + 24
    marks, column, line = [], 0, 0
    for token, foreseen, drafted in zip(
        example["tokens"], example["foreseen"], example["drafted"], strict=True
    ):
        shown = token if line or column else token.lstrip()
        width = max(len(shown), len(drafted or ""))
        if column + width > COLUMNS:
            line, column, shown = line + 1, 0, shown.lstrip()
            width = max(len(shown), len(drafted or ""))
        x, y = left + column * ADVANCE, MARGIN + 62 + line * LINE
        if foreseen is not None:
            colour = FORESEEN if foreseen else MISSED
            inset = (len(shown) - len(shown.lstrip())) * ADVANCE
            marks.append(
                f'<rect x="{x + inset:.1f}" y="{y - 14}" width="{len(shown.strip()) * ADVANCE:.1f}" height="19" '
                f'rx="3" fill="{colour}"/>'
            )
        marks.append(f'<text x="{x:.1f}" y="{y}">{escape(shown)}</text>')
        if drafted is not None:
            marks.append(
                f'<text x="{x:.1f}" y="{y + 16}" font-size="11" fill="#b03a2e">{escape(drafted)}</text>'
            )
        column += width
    height = max(SIDE + 2 * MARGIN, MARGIN + 62 + line * LINE + 40)
    total = left + COLUMNS * ADVANCE + MARGIN
    picture = io.BytesIO()
    miniature.sample_example(example["task"], int(example["prompt"])).scene.render().save(picture, "PNG")
    question = " ".join(example["question"].split())
    path.write_text(
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{height}" font-size="13" '
                'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" xml:space="preserve">',
                '<rect width="100%" height="100%" fill="white"/>',
                f'<image x="{MARGIN}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" '
                f'href="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"/>',
                f'<text x="{left}" y="{MARGIN + 14}" fill="#555">{escape(_cut(question, COLUMNS))}</text>',
                f'<rect x="{left}" y="{MARGIN + 22}" width="10" height="10" fill="{FORESEEN}"/>'
                f'<text x="{left + 15}" y="{MARGIN + 31}" font-size="11" fill="#555">foreseen</text>'
                f'<rect x="{left + 90}" y="{MARGIN + 22}" width="10" height="10" fill="{MISSED}"/>'
                f'<text x="{left + 105}" y="{MARGIN + 31}" font-size="11" fill="#555">'
                "not foreseen, the draft's guess below</text>",
                *marks,
                "</svg>",
            ]
        )
        + "\n"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."
