"""Products by finite differences of gradients, and their step."""
