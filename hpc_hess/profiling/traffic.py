"""Bytes that a step moves, by arithmetic."""

from __future__ import annotations


def orthogonalisation_bytes(rows: int, row_bytes: int, vector_bytes: int) -> int:
    """Return what a reorthogonalisation against ``rows`` vectors moves: the basis three times, the vector five times."""
    return 3 * rows * row_bytes + 5 * vector_bytes
