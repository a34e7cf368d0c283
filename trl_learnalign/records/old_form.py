"""Older forms of `run.json`, put into today's.

Format 1 (version 0.1, and what came between) said `pool_size` of three things. Format 2 names them apart:
`dataset_size` (prompts of the dataset), `candidates` (those that a stage scored), `selected` (those that it took).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_learnalign.records.layout import SUBSETS

FORMAT = 2
"""Of today's `run.json`; a new number when a version cannot be read by those before it."""

_SELECTION = {"pool_size": "candidates", "size": "selected"}
_DATASET = {"pool_size": "dataset_size"}


def in_todays_form(data: Mapping[str, Any]) -> dict[str, Any]:
    """`run.json` of any version so far, with the keys of today.

    Args:
        data (mapping): Its contents.

    Raises:
        `ValueError`: If it was written by a later version in a form that this one cannot read.
    """
    form = data.get("format", 1)
    if form > FORMAT:
        raise ValueError(
            f"it has format {form}, of a later version of trl_learnalign, which this one cannot read"
        )
    if form == FORMAT:
        return dict(data)
    renewed = dict(data)
    renewed["format"] = FORMAT
    for part in ("identity", "plan"):
        if part in data:
            renewed[part] = _renamed(data[part], _DATASET)
    renewed["phases"] = {}
    for phase, notes in data.get("phases", {}).items():
        renew = _renewed_subsets if phase == SUBSETS else _renewed_notes
        renewed["phases"][phase] = renew(notes)
    return renewed


def _renewed_subsets(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The selector, which was the key alone, stands in the note too."""
    renewed = {}
    for selector, note in notes.items():
        renewed[selector] = _renamed(note, _SELECTION)
        renewed[selector]["selector"] = selector
    return renewed


def _renewed_notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    renewed = {}
    for key, note in notes.items():
        if key == "selection" and "measures" in note:
            # `select` noted its measuring so, without what selections have.
            key = "measures"
        renewed[key] = _renamed(note, _SELECTION) if key == "selection" else note
    return renewed


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed = {}
    for key, value in values.items():
        renamed[names.get(key, key)] = value
    return renamed
