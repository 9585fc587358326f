"""Extreme eigenpairs."""
