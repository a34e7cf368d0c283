"""Per-prompt gradients: capture, layer rules and projections; torch alone."""
