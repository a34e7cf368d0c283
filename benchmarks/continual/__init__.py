"""Continual selection at equal total compute."""
