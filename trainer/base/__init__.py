"""The base model that a LoRA is trained on."""
