"""Per-prompt gradients: capture, layer rules and projections; depends only on torch."""
