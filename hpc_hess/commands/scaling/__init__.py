"""hpc-hess scaling: sweeps, laws, the machine."""
