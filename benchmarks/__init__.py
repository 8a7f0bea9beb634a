"""Side by side with the peers (``python benchmarks/run.py``), and how a run grows (``python benchmarks/growth.py``)."""
