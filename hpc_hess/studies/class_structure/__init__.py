"""The Gauss-Newton matrix and the means of its classes."""
