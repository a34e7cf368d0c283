"""Scores → orders, choices and how far to trust them."""
