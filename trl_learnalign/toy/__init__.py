"""A small world on which reinforcement learning works within seconds: tasks, their rewards and a base model."""
