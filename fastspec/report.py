"""What an evaluation leaves behind: a JSON file, tables, a plot."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastspec.evaluation import Results

RESULTS, PLOT = "results.json", "results.png"
QUIET = "dim"
#: Columns that the widest table needs, long names and trees apart.
TABLE_WIDTH = 132
MEASURES = (
    ("block_efficiency", "block efficiency"),
    ("mbsu", "MBSU"),
    ("speedup", "wall-clock ratio"),
)


def report(results: Results, out: Path, console: Console) -> None:
    """Writes ``results.json`` and ``results.png`` to a folder and prints the tables."""
    write_json(results, out / RESULTS)
    if not console.is_terminal:
        console.width = max(console.width, TABLE_WIDTH)  # a file has no edge
    for table in tables(results.rows):
        console.print(table)
    console.print(
        "τ: tokens per target pass, with a 95 % bootstrap interval over prompts; accepted: by draft position\n"
        "tok/s, and their ratio to plain decoding: after the first token; TTFT: time to the first token, median\n"
        "same: whether all greedy texts are those of plain decoding",
        style=QUIET,
        soft_wrap=True,
    )
    for line in remarks(results):
        console.print(line, soft_wrap=True, markup=False)
    written = [RESULTS]
    try:
        plot(results.rows, out / PLOT)
    except ImportError:
        console.print("plot left out: matplotlib is not installed (the extra 'bench' brings it)")
    else:
        written.append(PLOT)
    console.print(f"written: {', '.join(str(out / name) for name in written)}", soft_wrap=True, markup=False)


def write_json(results: Results, path: Path) -> None:
    """Header and rows as one object; what was there before stays whole until the new file is."""
    partial = path.with_suffix(".partial")
    content = {"header": results.header, "rows": results.rows}
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    os.replace(partial, path)


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """A table for each task and temperature, plain decoding first."""
    tasks, drafts = (_labels(row[name] for row in rows) for name in ("task", "draft"))
    made: dict[tuple[str, float], Table] = {}
    for row in rows:
        place = (row["task"], row["temperature"])
        if place not in made:
            title = f"{escape(tasks[row['task']])}, temperature {row['temperature']:g}"
            made[place] = _empty_table(title, row["temperature"])
        plain, interval = row["draft"] is None, row["block_efficiency_interval"]
        cells = [
            "plain" if plain else escape(drafts[row["draft"]]),
            row["shape"],
            row["rule"] or "-",
            _number(row["block_efficiency"]),
            "-" if plain or interval is None else "{:.2f}-{:.2f}".format(*interval),
            " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]) or "-",
            _number(row["mbsu"]),
            _number(row["tokens_per_second"], 1),
            _number(row["speedup"]),
            f"{row['first_token_seconds'] * 1e3:.1f} ms",
        ]
        if row["temperature"] == 0:
            cells.append("-" if plain else "yes" if row["identical"] else "NO")
        made[place].add_row(*cells)
    return list(made.values())


def remarks(results: Results) -> list[str]:
    """What a reader of the tables must know: texts that differ, answers that broke off, what was left out."""
    lines = [f"left out: {reason}" for reason in results.header["left_out"]]
    for row in results.rows:
        name = f"{row['task']}, {row['draft'] or 'plain'}, {row['shape']}, {row['rule'] or '-'}"
        if row.get("differing"):
            shown = ", ".join(row["differing"][:5]) + (", ..." if len(row["differing"]) > 5 else "")
            lines.append(f"NOT identical to plain decoding: {name}: prompts {shown}")
        broken = row["finish_reasons"].get("invalid_logits")
        if broken:
            lines.append(f"NaN or infinite logits ended {broken} answers: {name}")
    return lines


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of each measure by task, a colour for each way of speculating, a column for each temperature.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["draft"] is not None]
    tasks, drafts = (_labels(row[name] for row in rows) for name in ("task", "draft"))
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    ways = list(dict.fromkeys(_way(row) for row in rows))
    colours = colormaps["tab10" if len(ways) <= 10 else "tab20"].colors
    width = 0.8 / len(ways)
    column_inches = max(4.0, 1.0 + 0.25 * len(ways) * len(tasks))
    figure = Figure(figsize=(column_inches * len(temperatures), 8), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(temperatures), squeeze=False, sharey="row")
    for (measure, title), axes_of_row in zip(MEASURES, grid, strict=True):
        axes_of_row[0].set_ylabel(title)
        for temperature, axes in zip(temperatures, axes_of_row, strict=True):
            for place, way in enumerate(ways):
                chosen = [row for row in rows if row["temperature"] == temperature and _way(row) == way]
                values = [row[measure] or 0.0 for row in chosen]
                intervals = [row.get(f"{measure}_interval") for row in chosen]
                axes.bar(
                    [index + (place - (len(ways) - 1) / 2) * width for index in range(len(chosen))],
                    values,
                    width,
                    yerr=error_bars(values, intervals),
                    color=colours[place % len(colours)],
                    error_kw={"linewidth": 0.8},
                    label=" ".join((drafts[way[0]], *way[1:])),
                )
            axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
            axes.set_xticks(range(len(tasks)), tasks.values())
            if measure == MEASURES[0][0]:
                axes.set_title(f"temperature {temperature:g}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(ways)), fontsize="small")
    figure.savefig(path, dpi=150)


def _way(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["draft"], row["shape"], row["rule"]


def error_bars(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]]:
    """Lengths below and above each value; none where there is no interval."""
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    # A percentile interval of few prompts may leave the value itself outside.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    return [below, above]


def _empty_table(title: str, temperature: float) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style=QUIET,
        padding=(0, 1, 0, 0),
    )
    table.add_column("draft", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("rule", overflow="fold")
    for column in ("τ", "95 %", "accepted", "MBSU", "tok/s", "ratio", "TTFT"):
        table.add_column(column, justify="right", no_wrap=column != "accepted")
    if temperature == 0:
        table.add_column("same", no_wrap=True)
    return table


def _labels(names: Any) -> dict[str, str]:
    """Short names: the last part of a path where it says enough, without a task file's extension."""
    distinct = [name for name in dict.fromkeys(names) if name is not None]
    short = {
        name: Path(name).stem if name.endswith((".jsonl", ".json")) else Path(name).name for name in distinct
    }
    times = Counter(short.values())
    return {name: label if label and times[label] == 1 else name for name, label in short.items()}


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
