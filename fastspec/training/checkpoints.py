"""Checkpoints of transformers' Trainer: which one is whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end.

    Trainer writes a checkpoint into a new folder and ``trainer_state.json`` last; a kill or a full disk leaves a folder
    without it, or with half of it.
    """
    return next((path for path in reversed(_checkpoints(folder)) if _is_whole(path)), None)


def remove_torn_checkpoints(folder: Path) -> list[Path]:
    """Removes what cannot be resumed from: Trainer would write into it, and count it among those to keep."""
    torn = [path for path in _checkpoints(folder) if not _is_whole(path)]
    for path in torn:
        shutil.rmtree(path)
    return torn


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return "global_step" in state
