"""What selectors need, measured with the trainer that is there: rollouts, gradients, texts."""
