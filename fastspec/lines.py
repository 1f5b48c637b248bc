"""Files from users: lines with their numbers, and bad ones with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A line that cannot be used."""

    def __init__(self, path: Path, number: int, reason: str):
        super().__init__(f"{path}, line {number}: {reason}")
        self.path, self.number, self.reason = path, number, reason

    def __reduce__(self) -> tuple:
        return DataError, (self.path, self.number, self.reason)  # for other processes


@dataclass
class BadLines:
    """What happens to bad lines: the first ends the run, or all are counted and skipped.

    Attributes:
        skip: whether to go on.
        messages: of each skipped line, by file and number: a line read twice counts once.
    """

    skip: bool = False
    messages: dict[tuple[Path, int], str] = field(default_factory=dict)

    def report(self, error: DataError) -> None:
        """Counts the error, or raises it."""
        if not self.skip:
            raise error
        self.messages.setdefault((error.path, error.number), str(error))

    def __len__(self) -> int:
        return len(self.messages)

    def summary(self) -> str:
        """A line for the user, empty if nothing was skipped."""
        if not self.messages:
            return ""
        counts = Counter(path for path, _ in self.messages)
        files = ", ".join(f"{count} of {path}" for path, count in counts.items())
        return f"skipped bad lines: {files}; the first: {next(iter(self.messages.values()))}"


@dataclass(frozen=True)
class Line:
    """One line of a file; ``offset`` is where it begins, in bytes."""

    path: Path
    number: int
    offset: int
    text: str

    def error(self, reason: str) -> DataError:
        """What is wrong with it, with file and line number."""
        return DataError(self.path, self.number, reason)


def parse_object(line: Line) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        DataError: if it holds none.
    """
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is no JSONDecodeError
        raise line.error(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise line.error(f"expected a JSON object, got {shown(record)}")
    return record


def shown(value: Any) -> str:
    """A value of a file as messages quote it."""
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)[:60]


def decode_line(path: Path, number: int, raw: bytes) -> str:
    """The text of a line.

    Raises:
        DataError: if it is not UTF-8.
    """
    try:
        # A byte order mark is no part of the first line.
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(path, number, f"not UTF-8: {error.reason} at byte {error.start}") from None


def read_lines(path: Path, bad: BadLines) -> Iterator[Line]:
    """All lines of a file, empty ones too.

    Raises:
        ValueError: for a file that is missing, a folder or empty.
        DataError: for a line that is not UTF-8, unless bad lines are skipped.
    """
    if not path.is_file():
        raise ValueError(f"file not found: {path}" if not path.exists() else f"{path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield Line(path, number, offset, decode_line(path, number, raw))
            except DataError as error:
                bad.report(error)
            offset += len(raw)
