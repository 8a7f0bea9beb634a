"""The trainer as a command."""
