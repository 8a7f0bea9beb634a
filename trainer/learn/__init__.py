"""The training loop: data, loss, gradients, optimizer and LoRA."""
