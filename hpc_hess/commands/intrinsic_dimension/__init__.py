"""hpc-hess intrinsic-dimension: how few dimensions suffice."""
