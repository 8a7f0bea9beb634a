"""A GPU that is not there: see :mod:`tests.card.device`."""
