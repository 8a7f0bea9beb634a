"""Grids of runs: what is varied, the list of runs, their figures, and the page that shows them."""
