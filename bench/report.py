"""Headers, tables and files of results."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import torch

from bench.timing import Timing

RESULTS = Path(__file__).parent / "results"


def header(read_bandwidth: float, commit: str | None = None) -> dict:
    """What every result says about where it came from."""
    import triton

    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw"
    values = _run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]).split(", ")
    driver, sm, memory, most, power = values if len(values) == 5 else ("unknown",) * 5
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _run(["git", "rev-parse", "--short", "HEAD"]) or "unknown",
        "clocks": {"sm": sm, "memory": memory, "max_sm": most, "power": power},
        "read_bandwidth_tbs": round(read_bandwidth / 1e12, 3),
    }


def clock_megahertz() -> float:
    """The multiprocessors' present clock."""
    value = _run(["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"])
    if not value:
        raise RuntimeError("nvidia-smi does not tell clocks.sm")
    return float(value)


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` to ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(question: str, head: dict, rows: list[dict], out: Path | None = None) -> Path:
    """Writes ``<out or results>/<gpu>/<question>.json`` and returns its path."""
    folder = (out or RESULTS) / slug(head["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{question}.json"
    path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
    return path


def result_row(
    name: str,
    timing: Timing,
    floor: float | None = None,
    others: dict[str, Timing] | None = None,
    *,
    unit: str = "us",
    num_bytes: int | None = None,
    **more: float,
) -> dict:
    """One row of results.

    Args:
        name: what was timed, parts separated by slashes.
        timing: in microseconds.
        floor: the least it could take, in microseconds.
        others: baselines of the same run; their times over this one become ratios.
        unit: ``us`` or ``ms``, for the time in the row.
        num_bytes: what it must read; the row then tells the TB/s.
        more: further figures, by name.
    """
    scale = {"us": 1.0, "ms": 1e3}[unit]
    result = {"name": name, unit: round(timing.median / scale, 3)}
    result |= {"p10": round(timing.p10 / scale, 3), "p90": round(timing.p90 / scale, 3)}
    if num_bytes is not None:
        result["tbs"] = round(num_bytes / timing.median * 1e-6, 3)
    if floor is not None:
        result["share_of_floor"] = round(floor / timing.median, 3)
    if others:
        result["ratio"] = {other: round(their.median / timing.median, 2) for other, their in others.items()}
    return result | {key: round(value, 3) for key, value in more.items()}


def finding_row(name: str, **figures: float | list) -> dict:
    """One row of results without a time: figures by name, and lists of what was found."""
    return {"name": name, **figures}


_COLUMNS = ("name", "us", "ms", "p10", "p90", "tbs", "share_of_floor", "ratio")


def print_table(rows: list[dict]) -> None:
    """One line per row: time, spread, TB/s, share of the floor, ratios and other figures, those that it has."""
    width = max(len(row["name"]) for row in rows)
    print(f"{'':<{width}} {'time':>9}    {'p10':>9} {'p90':>9} {'TB/s':>6} {'floor':>6}  ratio")
    for row in rows:
        unit = "us" if "us" in row else "ms"
        share = row.get("share_of_floor")
        notes = [f"{value:.2f}x {name}" for name, value in row.get("ratio", {}).items()]
        notes += [
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in _COLUMNS
        ]
        times = [f"{row[column]:.3f}" if column in row else "" for column in (unit, "p10", "p90", "tbs")]
        print(
            f"{row['name']:<{width}} {times[0]:>9} {unit if times[0] else '':<2} {times[1]:>9} {times[2]:>9} "
            f"{times[3]:>6} {'' if share is None else format(share, '.0%'):>6}  {'  '.join(notes)}",
            flush=True,
        )


def _run(command: list[str]) -> str:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
