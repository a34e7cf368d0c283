"""The process that runs parts of the check one after the other, and writes a line about everything that comes out.

What a part needs is imported within the part's own time.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gpu_check.record import PartSkippedError, Record, Setting, described, release_memory

ANOTHER_PROCESS = 3
"""What a worker returns after a part that raised: the parts behind it are for another one."""


def run_part(name: str, place: str, setting: Setting, record: Record) -> bool:
    """Run one part.

    Args:
        name (`str`): Of the part.
        place (`str`): `module:function`.
        setting (`Setting`): Handed to the function.
        record (`Record`): Likewise.

    Returns:
        `bool`: Whether this process may run another part.
    """
    record.write("begin", part=name)
    module, _, function = place.partition(":")
    try:
        part = getattr(importlib.import_module(module), function)
        gc.freeze()  # garbage is collected after every training: not among the objects of imported modules
        part(setting, record)
    except PartSkippedError as reason:
        record.write("end", skipped=str(reason))
    except BaseException as error:
        traceback.print_exc()
        record.write("end", error=described(error))
        return False
    else:
        record.write("end")
    release_memory()
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts of the command line, up to one that raises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", help="NAME=MODULE:FUNCTION")
    parser.add_argument("--device", required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--other-gpu")
    parser.add_argument("--lines", type=Path, required=True)
    options = parser.parse_args(arguments)
    record = Record(options.lines)
    for part in options.parts:
        name, _, place = part.partition("=")
        folder = options.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(options.device, options.small, folder, options.other_gpu)
        if not run_part(name, place, setting, record):
            return ANOTHER_PROCESS
    return 0


if __name__ == "__main__":
    sys.exit(main())
