"""The only room with private names of TRL, transformers, accelerate and DeepSpeed."""
