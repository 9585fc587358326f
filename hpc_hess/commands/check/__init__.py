"""hpc-hess check: how far products can be trusted."""
