"""The file of distilled answers: appended to, resumed after a kill, never mixed with those of another run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastspec.lines import DataError
from fastspec.training.arguments import differing_arguments, write_arguments


class AnswerFile:
    """JSON lines, one per answer, each with an ``id``; the arguments stand beside them in ``NAME.arguments.json``.

    A line counts once it ends with its newline: what a kill left of the last one is dropped, and its answer is asked
    for again.

    Args:
        path: the file; its folder is made.
        arguments: what the answers depend on, ready for JSON.

    Raises:
        ValueError: if the file was begun with other arguments or by something else, or another process writes it.
        DataError: if a line in it is not an answer.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a+b")
        try:
            self._lock()
            self._check_arguments(arguments)
            #: The ids of the answers in the file.
            self.done: set[str] = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes answers; on return they survive a kill, and a power cut."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._file.write(lines.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(record["id"] for record in records)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self._path}") from None

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        beside = self._path.with_name(self._path.name + ".arguments.json")
        if self._path.stat().st_size == 0:
            write_arguments(beside, arguments)
            return
        if not beside.is_file():
            raise ValueError(
                f"{self._path} has content, but {beside.name}, which would tell of its arguments, is missing: "
                "choose another --out"
            )
        differing = differing_arguments(beside, arguments)
        for name, (before, now) in differing.items():
            raise ValueError(
                f"{self._path} was begun with other arguments ({', '.join(differing)}): {name} was "
                f"{before!r} and is now {now!r}; choose another --out or remove it"
            )

    def _read(self) -> set[str]:
        done: set[str] = set()
        end = 0
        self._file.seek(0)
        for number, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                self._file.truncate(end)
                break
            try:
                done.add(json.loads(raw)["id"])
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    self._path, number, "not a distilled answer; remove the line to go on"
                ) from None
            end += len(raw)
        return done
