"""steps.csv and validations.csv of a run: files that grow in rows as well as in columns."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.checkpoint import write_file
from pipeline.logger import FILES, Position


class CsvFile:
    """Rows of named values. The first row decides the columns; where a later one brings a new name, the file is written anew with
    one column more, at the end, which is empty in the rows above."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []
        self._file: IO[str] | None = None

    def remove(self) -> None:
        """Start without a file."""
        self.close()
        self.path.unlink(missing_ok=True)
        self._columns = []

    def rows(self) -> list[dict[str, str]]:
        """The whole rows of the file, as text; a last one without its line break was torn by a kill."""
        return self._read()[1]

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write these rows, and no others, at once. Columns that the file has stay; without any row there is no file."""
        header = self._read()[0]
        self.remove()
        if not rows:
            return
        self._columns = list(dict.fromkeys([*header, *(key for row in rows for key in row)]))
        text = _as_csv([self._columns]) + _as_csv(self._cells(row) for row in rows)
        write_file(self.path, text.encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is in the file when this returns."""
        if not set(row) <= set(self._columns):
            self.replace([*self.rows(), row] if self._columns else [row])
            return
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8", newline="")
        self._file.write(_as_csv([self._cells(row)]))
        self._file.flush()

    def sync(self) -> None:
        """Have it on the disk itself."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        return [row.get(column, "") for column in self._columns]

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Columns and whole rows of the file."""
        if not self.path.is_file():
            return [], []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        header, *lines = list(csv.reader(io.StringIO(whole))) or [[]]
        return header, [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]


def _as_csv(lines: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


class CsvLog:
    """steps.csv and validations.csv."""

    def __init__(self, folder: Path) -> None:
        self._files = {kind: CsvFile(folder / f"{name}.csv") for kind, name in FILES.items()}

    def begin(self) -> None:
        for file in self._files.values():
            file.remove()

    def resume(self, kept: Sequence[Mapping[str, Any]], position: Position) -> None:  # noqa: ARG002  metrics.jsonl says what is kept
        for kind, file in self._files.items():
            measured = {row["episode"]: row for row in file.rows()}
            lines = [_without_kind(line) for line in kept if line["kind"] == kind]
            file.replace([{**measured.get(str(line["episode"]), {}), **line} for line in lines])

    def write(self, line: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        self._files[line["kind"]].append({**_without_kind(line), **measured})

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self, failed: bool) -> None:  # noqa: ARG002  a file keeps its lines either way
        for file in self._files.values():
            file.close()


def _without_kind(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "kind"}
