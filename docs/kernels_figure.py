"""Draws docs/kernels.svg: one verification of a chain of five in time, by the clock of its first thread."""

from __future__ import annotations

from pathlib import Path

# Microseconds of the parts on an H100; the rows and the table of docs/kernels.md are the same measurement.
PARTS = ("launch and rest", "read", "statistics", "walk", "output")
COLOURS = ("#9aa5b1", "#3b6ea8", "#6aa84f", "#c27c0e", "#8e63a9")
ROWS = {
    "greedy": (1.19, 2.92, 0.60, 0.78, 0.37),
    "temperature": (2.89, 4.36, 0.91, 3.45, 0.35),
    "top-k, top-p": (3.69, 12.66, 1.11, 3.07, 0.28),
}
SCALE, LEFT, TOP, BAR, GAP = 34, 110, 46, 26, 16


def main() -> None:
    """Writes the figure beside this file."""
    width = LEFT + int(22 * SCALE) + 20
    height = TOP + len(ROWS) * (BAR + GAP) + 34
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for index, (part, colour) in enumerate(zip(PARTS, COLOURS, strict=True)):
        x = LEFT + index * 130
        svg.append(f'<rect x="{x}" y="12" width="14" height="14" fill="{colour}"/>')
        svg.append(f'<text x="{x + 20}" y="24">{part}</text>')
    for row, (name, times) in enumerate(ROWS.items()):
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
    base = TOP + len(ROWS) * (BAR + GAP)
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
