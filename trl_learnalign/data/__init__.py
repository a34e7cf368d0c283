"""Questions, answers and prompts: converts datasets to what the trainer reads."""
