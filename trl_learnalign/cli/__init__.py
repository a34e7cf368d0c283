"""The commands, and what recipes share."""
