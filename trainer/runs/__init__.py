"""A run: its folder, its result, and what becomes of it."""
