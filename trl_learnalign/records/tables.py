"""Tables of a record, as they are read and written."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trl_learnalign.records.layout import REMEDY
from trl_learnalign.records.store import write_atomically


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file.

    Raises:
        `FileNotFoundError`: If it is not there.
        `ValueError`: If it is damaged, or a folder, of which pyarrow would read all files.
    """
    try:
        with open(path, "rb") as file:
            return pq.read_table(file)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}.") from error


def parquet(table: pa.Table) -> bytes:
    """The content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file; atomically."""
    write_atomically(path, parquet(table))
