"""What the loss is averaged over: documents, tokens, samples, and the first forward pass on them."""
