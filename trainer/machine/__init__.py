"""The machine a run uses: devices, precision, memory, numerics and random numbers."""
