"""Rows of the record: found by what they are of, and written as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def find(record: dict[str, Any], **wanted: Any) -> list[Row]:
    """All rows with these values."""
    return [row for row in record["rows"] if all(row[name] == value for name, value in wanted.items())]


def only(record: dict[str, Any], **wanted: Any) -> Row:
    """The one row with these values.

    Raises:
        ValueError: if there is none, or several.
    """
    found = find(record, **wanted)
    if len(found) != 1:
        raise ValueError(f"expected one row of the record with {wanted}, got {len(found)}")
    return found[0]


def tau(row: Row) -> str:
    """Block efficiency with its interval."""
    interval = row["tau_interval"]
    return f"{row['tau']:.2f}" + ("" if interval is None else " ({:.2f}-{:.2f})".format(*interval))


def span(values: Sequence[float]) -> str:
    """Where values lie, in whole numbers."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """Names in italics."""
    marked = [f"*{name}*" for name in names]
    return " and ".join(filter(None, [", ".join(marked[:-1]), *marked[-1:]]))
