"""Data selection for RL post-training of language models, inside TRL."""
