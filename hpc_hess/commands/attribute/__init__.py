"""hpc-hess attribute: which examples speak for a text."""
