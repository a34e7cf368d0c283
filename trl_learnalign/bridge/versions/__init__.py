"""Differences between releases of TRL."""
