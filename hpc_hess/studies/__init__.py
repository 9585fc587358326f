"""What is computed of a matrix: a folder each, with what the report shows of it; the runner takes one after the other."""
