"""A journal of results, one line each, so that a killed run continues where it was."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A JSONL file whose first line says what it is about; each further line is one record.

    Records are on disk when :meth:`append` returns. What a kill left of a line is cut off when the journal is
    opened again, so its record counts as never made.

    Attributes:
        records: everything recorded so far, in order.

    Args:
        path: the file; made, with its folder, if there is none.
        header: what the records are about. A journal with records of another header is refused.

    Raises:
        ValueError: if the file is another run's, is in use, or is damaged anywhere but at its end.

    Example:
        >>> with Journal(Path("out/journal.jsonl"), {"gamma": 3}) as journal:
        ...     journal.append({"prompt": 0, "tokens": [5, 7]})
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115, closed by close()
        try:
            try:
                # Two runs that append to one journal would do everything twice.
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is in use by another run") from None
            self.records: list[dict[str, Any]] = self._read(header)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record and waits until it is on disk."""
        self._write(_line(record))
        self.records.append(record)

    def close(self) -> None:
        """Releases the file to others."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        if end == 0:
            if not _line(header).startswith(data):
                raise self._foreign()
            self._file.truncate(0)
            self._write(_line(header))
            return []
        lines = data[:end].splitlines(keepends=True)
        entries = [_entry(line) for line in lines]
        if len(lines) > 1 and entries[-1] is None:  # a file system's remains after a power failure
            entries.pop()
            end -= len(lines[-1])
        if entries[0] is None:
            raise self._foreign()
        if None in entries:
            number = entries.index(None) + 1
            raise ValueError(f"{self.path}, line {number}: damaged, not a JSON object")
        try:
            self._check(entries[0], json.loads(_line(header)))
        except ValueError:
            if len(entries) > 1 or entries[0].keys() != header.keys():
                raise
            # A run that ended before its first record, such as for a mistake in a file, left nothing to protect.
            self._file.truncate(0)
            self._write(_line(header))
            return []
        self._file.truncate(end)
        return entries[1:]

    def _check(self, there: dict[str, Any], header: dict[str, Any]) -> None:
        for name in (*header, *there):
            if name not in there or name not in header:
                raise self._foreign()
            if there[name] != header[name]:
                raise ValueError(
                    f"{self.path} is of a run with another {name}: {json.dumps(there[name])} there, "
                    f"{json.dumps(header[name])} now; write elsewhere, or delete it to begin anew"
                )

    def _foreign(self) -> ValueError:
        return ValueError(f"{self.path} is not a journal of such a run; write elsewhere, or delete it")

    def _write(self, line: bytes) -> None:
        while line:  # an unbuffered file may take less than it was given
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
