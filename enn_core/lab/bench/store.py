"""Finished runs on disk: one line of JSON each, appended as they end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enn_core.files.digests import SEAL, DigestError, check_seal, sealed

__all__ = ["Store"]


class Store:
    """Rows of finished runs in a file of JSON lines.

    Args:
        file: is made by the first row; a last line that a kill cut off is ignored and overwritten.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        self._end = 0
        if not file.exists():
            return
        raw = file.read_bytes()
        self._end = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[: self._end].splitlines(), 1):
            try:
                row = json.loads(line)
                check_seal(row)
                row.pop(SEAL, None)
                self.rows[row["key"]] = row
            except DigestError as error:
                raise ValueError(
                    f"line {number} of '{file}' {error}; remove the line, and the run is done again"
                ) from None
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"line {number} of '{file}' is no run of this bench; remove the line, or give "
                    "another folder"
                ) from error

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row, on disk when this returns."""
        line = json.dumps(sealed(row)).encode() + b"\n"
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self.rows[row["key"]] = dict(row)
