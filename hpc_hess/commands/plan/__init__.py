"""hpc-hess plan: what a run would take."""
