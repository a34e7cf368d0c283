"""`report.html`: one self-contained page about a run, and the comparison of several.

Needs matplotlib and Jinja2: `pip install 'trl-learnalign[report]'`.
"""

try:
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
except ImportError as error:  # an optional dependency: selection needs no pictures
    raise ImportError(
        f"The report needs {error.name}, which is not installed: pip install 'trl-learnalign[report]'. Records and "
        "tables are written without it."
    ) from error

from trl_learnalign.report.comparison import compare, write_comparison
from trl_learnalign.report.page import write_report
from trl_learnalign.report.run import Run, read_run

__all__ = ["Run", "compare", "read_run", "write_comparison", "write_report"]
