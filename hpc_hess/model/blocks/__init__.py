"""A model as a sequence of blocks: recorded, spliced, exchanged, run on one example."""
