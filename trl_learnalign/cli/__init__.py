"""The commands, and code shared with the recipes."""
