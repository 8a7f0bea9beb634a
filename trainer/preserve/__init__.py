"""Ways to keep the class."""
