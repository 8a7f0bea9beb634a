"""Stable Diffusion 1.x, 2.x and SDXL through diffusers and transformers."""
