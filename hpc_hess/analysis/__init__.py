"""Studies built from operators and linalg: what a spectrum's vectors and numbers say about a model."""
