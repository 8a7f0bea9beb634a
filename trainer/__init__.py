"""DreamBooth LoRA training, independent of any user interface.

The package is imported while ComfyUI starts, so importing it or any of its modules must be fast:
diffusers, peft, transformers and accelerate are imported inside the functions that need them.
"""
