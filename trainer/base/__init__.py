"""The base model that an adapter is trained on."""
