"""Scores → rankings and selections, their diversity and reliability."""
