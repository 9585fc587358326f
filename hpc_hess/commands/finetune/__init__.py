"""hpc-hess finetune: a small training loop."""
