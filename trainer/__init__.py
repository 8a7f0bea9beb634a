"""DreamBooth as LoRA on a diffusers UNet, with no knowledge of any user interface.

The package is imported while ComfyUI starts, so importing it (or any module of it) must stay cheap:
diffusers, peft, transformers and accelerate are imported inside the functions that need them.
"""
