"""A subset as one file: the rows of the file that it was chosen of, in their order, and what the selection says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_learnalign.records.selection_export import PREFIX
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.tables import write_table

ENDINGS = (".jsonl", ".parquet", ".csv")


def check_file(name: str) -> None:
    """Check that a file of this name can be written.

    Raises:
        `ValueError`: If it has another ending, or is a folder.
        `FileNotFoundError`: If its folder is not there.
    """
    path = Path(name)
    if path.suffix not in ENDINGS or path.is_dir():
        raise ValueError(f"output_file={name!r}: name a file that ends in {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output_file={name!r}: there is no folder {path.parent}; make it.")


def write_file(path: Path, subset: Dataset, source: str) -> None:
    """Write a subset, its rows in the order of the file that they come from.

    Args:
        path (`Path`): Where to; its ending says how.
        subset (`datasets.Dataset`): As `SubsetSelection.subset` gives it.
        source (`str`): The file, folder or hub dataset that it was chosen of.
    """
    in_order = subset.sort(f"{PREFIX}index")
    if path.suffix == ".parquet":
        write_table(path, in_order.with_format("arrow")[:])
    elif path.suffix == ".csv":
        write_atomically(path, in_order.to_pandas().to_csv(index=False).encode())
    else:
        written = _as_written(Path(source), in_order[f"{PREFIX}index"][:])
        lines = []
        for row in in_order:
            said = {name: value for name, value in row.items() if name.startswith(PREFIX)}
            own = {**written[row[f"{PREFIX}index"]], **said} if written else row
            lines.append(json.dumps(own, ensure_ascii=False, default=str) + "\n")
        write_atomically(path, "".join(lines).encode(errors="surrogatepass"))


def _as_written(source: Path, numbers: list[int]) -> Mapping[int, dict[str, Any]]:
    """Rows of a JSONL file as it has them: tables fill up objects with the keys of others, and read dates.

    Empty for other files, and where lines are no rows.
    """
    if source.suffix != ".jsonl" or not source.is_file():
        return {}
    wanted = set(numbers)
    rows = {}
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(line for line in file if line.strip()):
            if number in wanted:
                row = json.loads(line)
                if not isinstance(row, dict):
                    return {}
                rows[number] = {
                    name: value for name, value in row.items() if not name.startswith(PREFIX)
                }
    return rows if rows.keys() == wanted else {}
