"""What a run was begun with, beside what it makes: it may only be gone on with as it was begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_arguments(path: Path, arguments: dict[str, Any]) -> None:
    """Writes arguments, ready for JSON; a kill leaves the whole file or none of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(arguments, indent=1) + "\n")
    fresh.replace(path)


def differing_arguments(path: Path, arguments: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Those that differ from what the file says, by name: what was, and what is now.

    Raises:
        ValueError: for a file that is no JSON.
    """
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return {name: (before.get(name), now) for name, now in arguments.items() if before.get(name) != now}
