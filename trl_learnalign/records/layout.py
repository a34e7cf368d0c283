"""Every name on disk, once."""

SUBSETS = "subsets"
"""Folder of `trl-learnalign select` in its output folder."""

CORRELATIONS, OVERLAPS = "correlations", "overlaps"
"""Names of the tables in it, with column `selector` and one column for each selector."""
