"""Questions, answers and prompts: from a dataset to what the trainer reads."""
