"""What a run says of itself while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from trl_learnalign.config.base import Settings, setting


@dataclass
class Story(Settings):
    """Story: what is printed of warm-up, scoring and selection."""

    verbose: bool = setting(
        True,
        "Print what warm-up, scoring and each selection come to, on the main process and over its progress bar. "
        "Where Python's logging was set up for `trl_learnalign` (a level or a handler), that decides instead.",
    )
