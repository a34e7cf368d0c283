"""When things happen inside the trainer."""
