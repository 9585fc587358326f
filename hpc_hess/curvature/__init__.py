"""Products of curvature matrices with vectors: exact, by finite differences, and what is made of them."""
