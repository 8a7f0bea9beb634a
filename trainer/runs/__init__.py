"""Training runs: their folders, results, published LoRAs and disk usage."""
