"""Draws docs/kernels.svg: one verification of a chain of five in time, by the clock of its first thread."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "verify.json"
PARTS = ("launch and rest", "read", "statistics", "walk", "output")
COLOURS = ("#9aa5b1", "#3b6ea8", "#6aa84f", "#c27c0e", "#8e63a9")
SHAPE = "chain5/V32064"
LABELS = {"greedy": "greedy", "temperature": "temperature", "topk_topp": "top-k, top-p"}
SCALE, LEFT, TOP, BAR, GAP = 34, 110, 46, 26, 16


def recorded() -> dict[str, tuple[float, ...]]:
    """Microseconds of the parts by kind of sampling; first what the parts leave of the whole time."""
    times = {row["name"]: row.get("us", 0.0) for row in json.loads(RESULTS.read_text())["rows"]}
    rows = {}
    for kind, label in LABELS.items():
        parts = [times[f"parts/{SHAPE}/{kind}/{part}"] for part in PARTS[1:]]
        rows[label] = (max(times[f"verify/{SHAPE}/{kind}/cuda"] - sum(parts), 0.0), *parts)
    return rows


def main() -> None:
    """Writes the figure beside this file."""
    rows = recorded()
    width = LEFT + int(22 * SCALE) + 20
    height = TOP + len(rows) * (BAR + GAP) + 34
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for index, (part, colour) in enumerate(zip(PARTS, COLOURS, strict=True)):
        x = LEFT + index * 130
        svg.append(f'<rect x="{x}" y="12" width="14" height="14" fill="{colour}"/>')
        svg.append(f'<text x="{x + 20}" y="24">{part}</text>')
    for row, (name, times) in enumerate(rows.items()):
        x, y = float(LEFT), TOP + row * (BAR + GAP)
        svg.append(f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end">{name}</text>')
        for time, colour in zip(times, COLOURS, strict=True):
            svg.append(
                f'<rect x="{x:.1f}" y="{y}" width="{time * SCALE:.1f}" height="{BAR}" fill="{colour}"/>'
            )
            if time > 0.8:
                svg.append(
                    f'<text x="{x + time * SCALE / 2:.1f}" y="{y + 18}" text-anchor="middle" fill="white">'
                    f"{time:.1f}</text>"
                )
            x += time * SCALE
    base = TOP + len(rows) * (BAR + GAP)
    for tick in range(0, 23, 2):
        x = LEFT + tick * SCALE
        svg.append(f'<line x1="{x}" y1="{TOP - 6}" x2="{x}" y2="{base}" stroke="#00000022"/>')
        svg.append(f'<text x="{x}" y="{base + 16}" text-anchor="middle" fill="#555">{tick}</text>')
    svg.append(
        f'<text x="{LEFT + 22 * SCALE}" y="{base + 30}" text-anchor="end" fill="#555">microseconds</text>'
    )
    svg.append("</svg>")
    Path(__file__).with_name("kernels.svg").write_text("\n".join(svg) + "\n")


if __name__ == "__main__":
    main()
