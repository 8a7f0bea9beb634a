"""The machine a run finds itself on: numerics, memory, precision, devices."""
