"""JSON files whose rows are no objects: pyarrow, which reads them, ends the whole process at a row that is `null`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import fsspec

_NULL_IN_LIST = re.compile(rb"[\[,]\s*null\s*[,\]]")


def check_rows(path: Path) -> None:
    """Check that each row of a JSON file is an object; what is no JSON at all is left to its reader.

    Args:
        path (`Path`): Lines of objects, a list of them, or one object of columns; also compressed.

    Raises:
        `ValueError`: Naming the row, counted from 0.
    """
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            start = file.readline()
            if start.lstrip().startswith(b"["):
                _check_list(start + file.read())
                return
            row = 0
            for line in itertools.chain([start], file):
                if line.strip() == b"null":
                    raise _NullRowError(f"row {row} is null, and should be an object")
                row += bool(line.strip())
    except _NullRowError:
        raise
    except (OSError, ValueError, EOFError):
        return


class _NullRowError(ValueError):
    """A row that is no object."""


def _check_list(content: bytes) -> None:
    if not _NULL_IN_LIST.search(content):  # reading it all takes memory
        return
    rows = json.loads(content)
    for number, row in enumerate(rows):
        if row is None:
            raise _NullRowError(f"row {number} is null, and should be an object")
