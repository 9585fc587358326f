"""hpc-hess dynamics: spectra over checkpoints."""
