"""hpc-hess sketch-check: sketched against whole gradients."""
