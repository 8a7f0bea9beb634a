"""The small base model that ships with the pack, and everything it was made with."""
