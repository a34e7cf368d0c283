"""Measurements that selectors need, made with the trainer: rollouts, gradients, texts."""
