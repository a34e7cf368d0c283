"""`report.html`: one self-contained page about a run, and the comparison of several.

Pages need matplotlib and Jinja2: `pip install 'trl-learnalign[report]'`. The model card does without them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_learnalign.report.comparison import compare, write_comparison
    from trl_learnalign.report.page import write_report
    from trl_learnalign.report.run_data import Run, read_run

__all__ = ["Run", "compare", "read_run", "write_comparison", "write_report"]

_MODULES = {
    "Run": "run_data",
    "compare": "comparison",
    "read_run": "run_data",
    "write_comparison": "comparison",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:  # an optional dependency: selection needs no pictures
        raise ImportError(
            f"The report needs {error.name}, which is not installed: pip install 'trl-learnalign[report]'. Records "
            "and tables are written without it."
        ) from error
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
