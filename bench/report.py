"""Headers, tables and files of results."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def header(read_bandwidth: float, commit: str | None = None) -> dict:
    """What every result says about where it came from."""
    import triton

    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw"
    values = _run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]).split(", ")
    driver, sm, memory, most, power = values if len(values) == 5 else ("unknown",) * 5
    return {
        "gpu": torch.cuda.get_device_name(),
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


def print_table(rows: list[dict], unit: str = "us") -> None:
    """One fixed-width line per row: time, spread, share of the floor, ratios."""
    width = max(len(row["name"]) for row in rows)
    print(f"{'':<{width}} {unit:>9} {'p10':>9} {'p90':>9} {'floor':>6}  ratio")
    for row in rows:
        share = row.get("share_of_floor")
        ratios = "  ".join(f"{value:.2f}x {name}" for name, value in row.get("ratio", {}).items())
        print(
            f"{row['name']:<{width}} {row[unit]:>9.2f} {row['p10']:>9.2f} {row['p90']:>9.2f} "
            f"{'' if share is None else format(share, '>6.0%')}  {ratios}",
            flush=True,
        )


def _run(command: list[str]) -> str:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
