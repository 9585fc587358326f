"""A run on disk: its stores, appended and committed row by row, and the files beside them."""
