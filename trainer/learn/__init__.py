"""The training step and what goes into it."""
