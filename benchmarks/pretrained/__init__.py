"""GRPO of a real pretrained model."""
