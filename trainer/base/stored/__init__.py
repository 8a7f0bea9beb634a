"""A base model from a single file or a diffusers folder."""
