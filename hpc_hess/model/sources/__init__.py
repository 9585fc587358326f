"""Where a model comes from: found, recognised, its tensors read or drawn."""
