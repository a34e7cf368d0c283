"""The callback and the components that it drives."""
