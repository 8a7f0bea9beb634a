"""Plans for memory, and what to do when it runs out."""
