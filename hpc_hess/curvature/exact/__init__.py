"""Exact products, streamed block by block or of the whole model."""
