"""The inverse on the gradient."""
