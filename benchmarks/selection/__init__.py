"""The selection table: which selector trains best, from how many prompts, at what cost."""
