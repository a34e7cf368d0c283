"""Checks and forecasts before anything expensive."""
