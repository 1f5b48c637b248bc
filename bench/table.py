"""``python -m bench.table bench/results/<gpu>/pass.json``: where the time of recorded passes goes, as Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.study.markdown import table

HEAD = ("", "times", "MB", "µs", "TB/s", "of the read bandwidth", "µs in all", "of them beyond the bytes")


def tables(results: dict, names: list[str] | None = None) -> str:
    """A table for each pass: its phases, what they do not explain, and all together.

    Args:
        results: header and rows of ``python -m bench pass`` or ``draft``.
        names: rows to show; all that have phases unless given.

    Raises:
        ValueError: for a row that is not there or has no phases.
    """
    rows = {row["name"]: row for row in results["rows"]}
    phases: dict[str, dict[str, dict]] = {}
    for name, row in rows.items():
        if "times" in row:
            whole, _, phase = name.rpartition("/")
            phases.setdefault(whole, {})[phase] = row
    missing = [name for name in names or phases if name not in phases or name not in rows]
    if missing or not phases:
        raise ValueError(
            f"expected passes with phases, which a GPU with the fused pass records, got {', '.join(missing) or 'none'}"
            f" (there: {', '.join(phases) or 'none'})"
        )
    bandwidth = results["header"]["read_bandwidth_tbs"]
    return "\n\n".join(
        [_origin(results["header"])]
        + [f"`{name}`\n\n{_table(rows[name], phases[name], bandwidth)}" for name in names or phases]
    )


def _origin(head: dict) -> str:
    return (
        f"{head['gpu']}, driver {head['driver']}, torch {head['torch']}, SM clock {head['clocks']['sm']}, read "
        f"bandwidth {head['read_bandwidth_tbs']} TB/s in the same run, commit {head['commit']}."
    )


def _table(whole: dict, phases: dict[str, dict], bandwidth: float) -> str:
    total = whole["us"] if "us" in whole else 1e3 * whole["ms"]
    body = [
        _line(phase, row["times"], row["megabytes"], row["us"], bandwidth) for phase, row in phases.items()
    ]
    explained = sum(row["times"] * row["us"] for row in phases.values())
    megabytes = sum(row["times"] * row["megabytes"] for row in phases.values())
    rest = total - explained
    body.append(("launch and end", "1", "", f"{rest:.1f}", "", "", f"{rest:.1f}", f"{rest:.1f}"))
    return table(HEAD, [*body, _line("the pass", 1, megabytes, total, bandwidth)])


def _line(phase: str, times: int, megabytes: float, microseconds: float, bandwidth: float) -> tuple[str, ...]:
    """One row; a megabyte in a microsecond is a terabyte per second."""
    floor = megabytes / bandwidth
    return (
        phase.replace("_", ", "),
        str(times),
        f"{megabytes:.1f}",
        f"{microseconds:.1f}",
        f"{megabytes / microseconds:.2f}",
        f"{floor / microseconds:.0%}",
        f"{times * microseconds:.1f}",
        f"{times * (microseconds - floor):.1f}",
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables of one file."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("results", type=Path, help="what `python -m bench pass` or `draft` wrote")
    parser.add_argument("rows", nargs="*", help="rows to show, such as pass/llava7b/rows6/ctx700; else all")
    given = parser.parse_args(arguments)
    try:
        print(tables(json.loads(given.results.read_text()), given.rows))
    except (OSError, ValueError) as error:
        parser.error(f"{given.results}: {error}")
    except (KeyError, TypeError, AttributeError) as error:
        parser.error(
            f"{given.results} is not what `python -m bench pass` writes: {type(error).__name__}: {error}"
        )


if __name__ == "__main__":
    main()
