"""The command-line interface of the trainer."""
