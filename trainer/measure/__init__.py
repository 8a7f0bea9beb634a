"""What a LoRA does to its base: how far the class and everything else move, and how well the subject is drawn."""
