"""Sketches of gradients and products: random linear maps R^N -> R^D, and what can be told from the images alone.

Schioppa, "Efficient Sketches for Training Data Attribution and Studying the Loss Landscape", NeurIPS 2024
(arXiv 2402.03994).
"""
