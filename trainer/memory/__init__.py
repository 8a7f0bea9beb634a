"""What fits into memory, and what to do when it does not."""
