"""The version, for those who would otherwise import the whole package's face."""

__version__ = "0.1.0"
