"""Benchmarks as modules: they are scripts beside the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import cases

BENCHMARKS = cases.ROOT / "benchmarks"


@contextmanager
def benchmark_modules(*names: str) -> Iterator[dict[str, ModuleType]]:
    """Modules of `benchmarks/` by name, for as long as they are needed: such short names could be anybody's."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and file.startswith(str(BENCHMARKS)):
                del sys.modules[name]
