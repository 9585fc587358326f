"""The diagonal, entry by entry."""
