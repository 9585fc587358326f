"""Stochastic Lanczos quadrature: the loop and its result."""
